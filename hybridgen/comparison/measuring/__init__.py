"""The measurement: engines and baselines on the same weights, called in turn."""
