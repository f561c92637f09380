"""Where the tensors of a checkpoint's files go in its model, by their names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from hybridgen.models.text_part import left_out_names


class Places:
    """The model's names of a file's tensors.

    Names are taken as they are, or with and without the model's prefix, as transformers does; those of a multimodal
    model also as transformers renames them, because its checkpoints have names of the time before its class. What is
    joined or split while it is loaded (experts) has no place.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.expected: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
        """The model's tensors, by name."""
        self.prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
        self._renamed = _renaming(model) if left_out_names(model) else None

    def of(self, name: str) -> str | None:
        """The model's name of a file's tensor."""
        candidates = [name, self.prefix + name, name.removeprefix(self.prefix)]
        if self._renamed is not None:
            candidates.append(self._renamed(name))
        return next((candidate for candidate in candidates if candidate in self.expected), None)


def _renaming(model: PreTrainedModel) -> Callable[[str], str] | None:
    """What transformers calls a tensor of a file; None where it does not tell (its functions for it are not public)."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
        rename_source_key("a.weight", renamings, [])
    except Exception:  # of another version
        return None
    return lambda name: rename_source_key(name, renamings, [])[0]
