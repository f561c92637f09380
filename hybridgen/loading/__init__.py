"""From a directory, a hub id or a live module to a Hugging Face model on its device.

`Checkpoint.open` finds the model and checks everything that does not need its weights: device, config,
architecture (`check_supported`), tokenizer, weight files. `Checkpoint.load` reads the weights. The room
knows nothing of caches, attention or compilation.
"""

from hybridgen.loading.checkpoint import Checkpoint, LoadedModel
from hybridgen.loading.support import check_supported

__all__ = [
    "Checkpoint",
    "LoadedModel",
    "check_supported",
]
