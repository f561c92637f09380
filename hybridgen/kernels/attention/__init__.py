"""The KV-cache write and paged attention: ops, their reference, their Triton kernels."""
