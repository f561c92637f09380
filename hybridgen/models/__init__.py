"""How a Hugging Face model is called with our cache and our attention.

The model's own modules run unchanged. A probe finds where they attend; from then on every attention call comes to
`attention.paged_attention`, which writes keys and values into the paged cache and attends to it. No Hugging Face
cache object and no mask is ever built.
"""

from hybridgen.models.attention import ATTENTION_NAME, LayerBinding, StepMetadata
from hybridgen.models.binding import BoundModel, bind

__all__ = ["ATTENTION_NAME", "BoundModel", "LayerBinding", "StepMetadata", "bind"]
