"""Noise as a function of (seed, position, token id): a counter-based generator.

A generator with hidden state would make a draw depend on what else ran. Here the noise of one token is a hash
of the request's seed, of the position in its sequence and of the token id, so it is the same alone or in a
batch, in any row, after a restart and on any device.

The hash is SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014;
constants of Vigna's public-domain splitmix64.c): output i of the stream with state `key` is `mix64(key + (i +
1) * GOLDEN)`, which any i can ask for directly. Each (seed, position) has its own stream, token ids count
along it.

Integers are int64 tensors: torch has no unsigned 64-bit arithmetic, and additions and products modulo 2^64
have the same bits in two's complement. Only the right shift differs, see `_shift`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def signed64(value: int) -> int:
    """The int64 with the same low 64 bits."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


GOLDEN = signed64(0x9E3779B97F4A7C15)
_MIX_1 = signed64(0xBF58476D1CE4E5B9)
_MIX_2 = signed64(0x94D049BB133111EB)
_BITS = 40


def _shift(x: Tensor, count: int) -> Tensor:
    """Logical right shift; `>>` on int64 copies the sign, which the mask takes away."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def mix64(x: Tensor) -> Tensor:
    """SplitMix64's output function, a bijection of 64-bit integers; int64 in and out, any shape."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _multiples_of_golden(count: int, device: torch.device) -> Tensor:
    """`i * GOLDEN` modulo 2^64 for i from 1 to `count`; int64 [count].

    As `~i * -GOLDEN`, because Inductor folds `arange * constant` into its loop index, which overflows: wrong
    numbers on CUDA (pytorch issue 175966), and on a CPU a C++ loop that ran past its end (torch 2.13). A
    bitwise operation ends the folding.
    """
    return ~torch.arange(count, device=device, dtype=torch.int64) * -GOLDEN


def random_bits(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """64 random bits per row and token id; the same on every device.

    Args:
        seeds: int64 [B].
        positions: integer [B].
        vocab_size: V.

    Returns:
        int64 [B, V].
    """
    keys = mix64(seeds ^ mix64(positions.to(torch.int64)))
    return mix64(keys[:, None] + _multiples_of_golden(vocab_size, seeds.device))


def bits_to_uniform(bits: Tensor) -> Tensor:
    """The top 40 bits as `(k + 0.5) * 2^-40`, never 0 or 1; int64 to float32, any shape.

    The half keeps 0 out. A float32 has 24 bits, so a k near 2^40 can round up to 1, hence the upper bound;
    that rounding costs nothing, because `uniform_to_gumbel` needs fine steps near 0 alone.
    """
    fraction = (_shift(bits, 64 - _BITS).to(torch.float32) + 0.5) * 2.0**-_BITS
    return fraction.clamp(max=1 - 2.0**-24)


def uniform_to_gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise, `-log(-log(1 - u))`; float32, any shape.

    The textbook form `-log(-log(u))` makes its large values, which decide the draw, from u near 1, where
    float32 steps by 2^-24: noise above 16.6 could not occur, and 10^5 tokens of probability 10^-9 each would
    be drawn about 1000 times too seldom. Near 0 float32 has steps as fine as the bits given, and `log1p`
    keeps them: with 40 bits the noise reaches 28.4.
    """
    return -torch.log(-torch.log1p(-uniform))


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise of each token id, from (seed, position, token id) alone.

    `argmax(logits + noise)` is a draw from `softmax(logits)` (the Gumbel-max trick; Maddison, Tarlow, Minka
    2014, arXiv:1411.0030). The uniform numbers are bitwise equal everywhere; the logarithms are those of the
    device and of its compiler, which can differ in the last bit.

    Args:
        seeds: int64 [B].
        positions: integer [B]; the position that the new token will have in its sequence.
        vocab_size: V.

    Returns:
        float32 [B, V].
    """
    return uniform_to_gumbel(bits_to_uniform(random_bits(seeds, positions, vocab_size)))
