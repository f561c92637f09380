import math
import shutil

import pytest
import torch

from hybridgen.sampling import gumbel_noise
from hybridgen.sampling.random import bits_to_uniform, mix64, random_bits, signed64, uniform_to_gumbel

MASK = 2**64 - 1


def splitmix64(state, count):
    """The published algorithm, in Python integers."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        out.append(finalize(state))
    return out


def finalize(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def unsigned(tensor):
    return [value & MASK for value in tensor.flatten().tolist()]


def ints(*values):
    return torch.tensor([signed64(v) for v in values], dtype=torch.int64)


def test_the_published_first_numbers():
    # The first outputs of splitmix64.c for seed 1234567, and for seed 0.
    known = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(1234567, 5) == known
    assert unsigned(random_bits(ints(0), ints(0), 1)) == [0xE220A8397B1DCDAF]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**62 + 12345, 2**63 - 1, 2**63, 2**64 - 1])
def test_bits_are_splitmix64_of_the_hashed_key(seed):
    positions = [0, 1, 77, 2**31, 2**40 + 3]
    bits = random_bits(ints(seed).expand(len(positions)), ints(*positions), 300)
    for row, position in zip(bits, positions, strict=True):
        assert unsigned(row) == splitmix64(finalize(seed ^ finalize(position)), 300)


def test_mix64_matches_on_random_words():
    words = torch.randint(-(2**63), 2**63 - 1, (1000,), generator=torch.Generator().manual_seed(0))
    assert unsigned(mix64(words)) == [finalize(w) for w in unsigned(words)]


def test_uniform_is_never_zero_or_one():
    extreme = bits_to_uniform(ints(0, MASK, MASK << 24, 1 << 24))
    assert extreme.dtype == torch.float32
    assert extreme.min() > 0
    assert extreme.max() < 1
    assert extreme[0] == 2.0**-41
    noise = uniform_to_gumbel(extreme)
    assert torch.isfinite(noise).all()
    assert noise.max() == pytest.approx(-math.log(2.0**-41), rel=1e-6)


def test_gumbel_of_rare_uniforms_is_exact():
    # What decides draws is the upper tail, that is, small uniforms; float64 is the reference.
    uniform = torch.logspace(-12, -0.001, 2000, dtype=torch.float64).float()
    exact = -(-(-uniform.double()).log1p()).log()
    torch.testing.assert_close(uniform_to_gumbel(uniform).double(), exact, rtol=1e-6, atol=1e-6)


def test_uniformity():
    uniform = bits_to_uniform(random_bits(torch.arange(100), torch.arange(100) * 7, 10_000))
    counts = torch.histc(uniform, bins=1000, min=0, max=1).double()
    expected = uniform.numel() / 1000
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - 999) < 5 * math.sqrt(2 * 999)


@pytest.mark.parametrize("step", ["seed", "position", "token"])
def test_neighbours_are_uncorrelated(step):
    count = 200_000
    seeds, positions = torch.full((count,), 11), torch.full((count,), 5)
    if step == "seed":
        seeds = torch.arange(count)
    elif step == "position":
        positions = torch.arange(count)
    if step == "token":
        uniform = bits_to_uniform(random_bits(ints(11), ints(5), count))[0].double()
    else:
        uniform = bits_to_uniform(random_bits(seeds, positions, 1))[:, 0].double()
    for lag in (1, 2, 3, 64):
        pair = torch.stack([uniform[:-lag], uniform[lag:]])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 5 / math.sqrt(count)


def test_no_repeats():
    seeds, positions = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    bits = random_bits(seeds.flatten(), positions.flatten(), 200)
    assert bits.unique().numel() == bits.numel()


def test_noise_depends_on_nothing_but_seed_position_token():
    seeds, positions = torch.tensor([5, 5, 9, 2**62]), torch.tensor([0, 3, 3, 1000])
    batch = gumbel_noise(seeds, positions, 1003)
    assert batch.shape == (4, 1003)
    assert batch.dtype == torch.float32
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(gumbel_noise(seeds[order], positions[order], 1003), batch[order])
    for row in range(4):
        alone = gumbel_noise(seeds[row : row + 1], positions[row : row + 1], 1003)[0]
        assert torch.equal(alone, batch[row])
        narrow = gumbel_noise(seeds[row : row + 1], positions[row : row + 1].int(), 400)[0]
        torch.testing.assert_close(narrow, batch[row, :400], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")
def test_compiled_bits_are_the_same():
    # Inductor folds arithmetic on arange into loop indices; see _multiples_of_golden.
    torch._dynamo.reset()
    seeds, positions = torch.arange(5) * 2**40, torch.arange(5) + 3
    compiled = torch.compile(random_bits, fullgraph=True, dynamic=True)
    for count in (1000, 1003):
        assert torch.equal(compiled(seeds, positions, count), random_bits(seeds, positions, count))
