"""Custom ops of the library; importing the package registers them under `torch.ops.hybridgen`.

`attention` has the KV-cache write and the paged attention ops. Triton is imported by the first call on a CUDA
tensor, so machines without it can import this package.
"""

from hybridgen.kernels.attention import decode_attention, prefill_attention, write_kv

__all__ = ["decode_attention", "prefill_attention", "write_kv"]
