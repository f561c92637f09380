"""What a layer looks like: equal where one compiled function serves, different where it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hybridgen.compilation.fingerprint import structure_of, token_dimension


class Layer(nn.Module):
    """A layer with a function and a tensor among its attributes."""

    def __init__(self, size: int = 8, act: Any = torch.relu) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.act = act
        self.table = torch.zeros(3, 64)
        self.index = 0


def look(layer: nn.Module, tokens: int = 7, **kwargs: Any) -> str:
    return structure_of(layer, (torch.zeros(1, tokens, 8),), kwargs, tokens)


def test_layers_of_one_kind_look_alike_whatever_their_values_and_numbers() -> None:
    one, other = Layer(), Layer()
    other.index = 5
    with torch.no_grad():
        other.linear.weight.fill_(3)
    assert look(one) == look(other)
    assert look(one, 7) == look(one, 64)  # also where a size equals the number of tokens


def changed_class(layer: Layer) -> None:
    layer.linear = nn.Sequential(layer.linear)


def changed_function(layer: Layer) -> None:
    layer.act = torch.tanh


def changed_dtype(layer: Layer) -> None:
    layer.linear.to(torch.bfloat16)


def changed_shape(layer: Layer) -> None:
    layer.table = torch.zeros(3, 65)


def changed_strides(layer: Layer) -> None:
    layer.table = torch.zeros(64, 3).t()


def changed_bias(layer: Layer) -> None:
    layer.linear.bias = None


def changed_training(layer: Layer) -> None:
    layer.eval()


@pytest.mark.parametrize(
    "change",
    [
        changed_class,
        changed_function,
        changed_dtype,
        changed_shape,
        changed_strides,
        changed_bias,
        changed_training,
    ],
)
def test_what_makes_another_kind(change: Any) -> None:
    layer = Layer()
    change(layer)
    assert look(layer) != look(Layer())


def test_a_class_that_is_patched_looks_different(monkeypatch: pytest.MonkeyPatch) -> None:
    before = look(Layer())
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: torch.nn.functional.linear(x, self.weight * 1.05))
    assert look(Layer()) != before


def test_arguments_count() -> None:
    layer = Layer()
    assert look(layer, use_cache=False) != look(layer, use_cache=True)
    assert look(layer, mask=None) != look(layer)
    assert look(layer, pair=(torch.zeros(1, 7, 4),)) != look(layer, pair=(torch.zeros(1, 7, 5),))
    assert look(layer, 1) != look(layer, 2)  # one token is a case of its own


def test_where_the_tokens_are() -> None:
    assert token_dimension(torch.zeros(1, 5, 3)) == 1
    assert token_dimension(torch.zeros(1, 1, 5, 1)) == 2  # a factor for the queries of all heads
    assert token_dimension(torch.zeros(1, 1, 5)) == 1
    assert token_dimension(torch.zeros(5)) == 0
    assert token_dimension(torch.zeros(5, 3)) is None
    assert token_dimension(torch.zeros(())) is None
