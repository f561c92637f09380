"""One model over several processes: each has a share of the weights, and all run the same steps (tensor parallel)."""
