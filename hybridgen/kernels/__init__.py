"""Custom ops of the library; importing the package registers them under `torch.ops.hybridgen`.

`attention` has the KV-cache write and the paged attention ops, `metadata` the copy of many small tensors in one
launch. Triton is imported by the first call on a CUDA tensor, so machines without it can import this package.
"""

from hybridgen.kernels.attention.ops import decode_attention, prefill_attention, write_kv
from hybridgen.kernels.step.metadata import MetadataCopy, copy_metadata

__all__ = ["MetadataCopy", "copy_metadata", "decode_attention", "prefill_attention", "write_kv"]
