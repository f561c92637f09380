"""A decode step of a few rows as a chain of Triton kernels."""
