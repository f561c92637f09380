"""A server process from its start to its end: signals, draining, clocks, descriptors, the port of the metrics."""
