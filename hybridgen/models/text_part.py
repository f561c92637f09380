"""The text part of a multimodal model: its decoder and head, called through the model's own forward.

A `...ForConditionalGeneration` class prepares masks and positions for its decoder and may change the logits behind the
head. So its forward is what runs, with token ids alone; `TextPart` shows everybody else a language model: the decoder,
the head, and the text's config. Encoders of images, video and sound are left out where the model is built here
(`without_encoders`), so that no memory is taken and no file is read for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from hybridgen.errors import UnsupportedModelError


class LeftOut(nn.Module):
    """Stands where an encoder was; text never calls it."""

    device = torch.device("meta")
    """Some forwards ask for it before they know that there is nothing to encode."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("this part was left out, because only text is run")


class TextPart(PreTrainedModel):
    """A language model around a multimodal one, over its very modules."""

    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, whole: PreTrainedModel) -> None:
        nn.Module.__init__(self)  # the base class would choose an attention for the config, which the modules share
        self.config = text_config(whole.config)
        self.name_or_path = whole.name_or_path
        given = getattr(whole, "generation_config", None)
        self.generation_config = given or GenerationConfig.from_model_config(whole.config)
        self.warnings_issued: dict[str, bool] = {}
        decoder, head = parts_of(whole)
        # First, so that these are the names under which the modules are found.
        self.model = decoder
        self.lm_head = head
        self.whole = whole

    def forward(self, **arguments: Any) -> Any:
        """What the whole model returns for token ids, with the logits that are asked for."""
        output = self.whole(**arguments)
        keep = arguments.get("logits_to_keep")
        # Some classes do not know the argument and return all.
        if isinstance(keep, Tensor) and output.logits.shape[1] != keep.shape[0]:
            output.logits = output.logits[:, keep]
        return output

    def generate(self, *arguments: Any, **keywords: Any) -> Any:
        """The whole model's own."""
        whole: Any = self.whole
        return whole.generate(*arguments, **keywords)

    def get_input_embeddings(self) -> nn.Module:
        return self.whole.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def can_generate(self) -> bool:  # type: ignore[override]
        return self.whole.can_generate()

    def _can_set_attn_implementation(self) -> bool:  # type: ignore[override]
        decoder: Any = self.model  # encoders may attend as they like
        return decoder._can_set_attn_implementation()


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the decoder of text in a multimodal model; a language model's own config as it is."""
    found = config.get_text_config(decoder=True)
    return found if isinstance(found, PreTrainedConfig) else config


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether a config is of a model with a decoder of text inside."""
    text = text_config(config)
    # An encoder-decoder's is made for the call.
    return text is not config and any(value is text for value in vars(config).values())


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """`TextPart` of a multimodal model; a language model as it is.

    Raises:
        UnsupportedModelError: it has no decoder, or no head.
    """
    return TextPart(model) if is_multimodal(model.config) else model


def parts_of(whole: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The decoder and the head of a multimodal model.

    Raises:
        UnsupportedModelError: it has none.
    """
    decoder: Any = whole.get_decoder()
    kind = type(whole).__name__
    if whole.get_output_embeddings() is None and isinstance(decoder, PreTrainedModel) and decoder is not whole:
        whole, decoder = decoder, decoder.get_decoder()  # a language model with its head inside
    head = whole.get_output_embeddings()
    if not isinstance(decoder, PreTrainedModel) or decoder is whole:
        raise UnsupportedModelError(f"{kind} has no decoder of text that can be taken apart (get_decoder())")
    if head is None:
        raise UnsupportedModelError(f"{kind} has no language model head; give a ...ForConditionalGeneration")
    return decoder, head


def without_encoders(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class, whose models have `LeftOut` in place of whatever text does not need. `as_text_part` ends it.

    transformers asks classes for their names and modules, which are the original's.
    """

    def build(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        leave_out(self)

    attributes = {
        "__init__": build,
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "_hybridgen_left_out": True,
    }
    return type(model_class.__name__, (model_class,), attributes)


def as_text_part(model: PreTrainedModel) -> PreTrainedModel:
    """`text_part` of a model that may have been built by a class of `without_encoders`; its class is the original's."""
    if vars(type(model)).get("_hybridgen_left_out"):
        model.__class__ = type(model).__mro__[1]
    return text_part(model)


def leave_out(whole: PreTrainedModel) -> None:
    """Put `LeftOut` in place of the modules with tensors that are neither the decoder, nor the head, nor embeddings."""
    if not is_multimodal(whole.config):
        return
    kept = [*parts_of(whole), whole.get_input_embeddings()]
    needed = {id(module) for part in kept for module in part.modules()}
    around = {id(module) for module in whole.modules() if any(id(inner) in needed for inner in module.modules())}
    left_out: list[str] = []
    for name, module in list(whole.named_modules()):
        if id(module) in needed or id(module) not in around:
            continue
        for child_name, child in list(module.named_children()):
            has_tensors = next(child.parameters(), next(child.buffers(), None)) is not None
            if id(child) not in around and has_tensors:
                setattr(module, child_name, LeftOut())
                left_out.append(f"{name}.{child_name}." if name else f"{child_name}.")
    tied: Any = getattr(whole, "all_tied_weights_keys", None)
    if isinstance(tied, dict):
        whole.all_tied_weights_keys = {
            one: other for one, other in tied.items() if not f"{one} {other}".startswith(tuple(left_out))
        }


def left_out_names(whole: nn.Module) -> tuple[str, ...]:
    """Names of the parts that `leave_out` replaced, each with a dot at its end."""
    return tuple(f"{name}." for name, module in whole.named_modules() if isinstance(module, LeftOut))
