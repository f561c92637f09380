"""What the benchmarks share: model shapes, timing, provenance, results."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before hybridgen: engines of a benchmark start cold and record all buckets, whatever an earlier run left.
os.environ.setdefault("HYBRIDGEN_COMPILE_CACHE", "0")

import torch
import transformers
from shapes import shape_config, shorten
from shapes import shape_dtype as shape_dtype  # as others of the benchmarks take it from here
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3Config,
)

import hybridgen
from hybridgen.demo import model_path
from hybridgen.kernels.linear.experts_form import Projection
from hybridgen.kernels.linear.layout import Block
from hybridgen.models.decoder import Decoder, DecoderLayer, Linear, Norm
from hybridgen.models.experts import sizes_of
from hybridgen.models.packed_experts import PackedExperts, PackedWeights, pad_rows
from hybridgen.models.projections import fuse_projections
from hybridgen.models.quantised import QuantisedLinear, QuantisedWeight
from hybridgen.models.share import Share
from hybridgen.models.weights import DenseWeight

RESULTS = Path(__file__).parent / "results"


def random_weight(kind: str, outputs: int, inputs: int, dtype: torch.dtype, device: str) -> QuantisedWeight:
    """Random codes as `quantization=` makes them: values of about inputs ** -0.5."""
    size, groups = inputs**-0.5, -(-inputs // 128)
    if kind == "fp8":
        data = torch.empty(outputs, inputs, dtype=dtype, device=device).normal_().to(torch.float8_e4m3fn)
        scales = torch.full((outputs, 1), size, device=device)
        return QuantisedWeight(kind, data, scales, None, inputs, Block(1, inputs), dtype)
    if kind == "int8":
        data = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
        scales = torch.full((outputs, groups), size / 73, dtype=dtype, device=device)
        return QuantisedWeight(kind, data, scales, None, inputs, Block(1, 128), dtype)
    words = torch.randint(-(2**31), 2**31, (outputs, -(-inputs // 8)), dtype=torch.int32, device=device)
    scales = torch.full((outputs, groups), size / 4.6, dtype=dtype, device=device)
    zeros = torch.full((outputs, groups), 8, dtype=torch.uint8, device=device)
    return QuantisedWeight("int4", words, scales, zeros, inputs, Block(1, 128), dtype)


def random_experts(own: torch.nn.Module, device: str) -> PackedExperts:
    """Experts in MXFP4 with random codes in the place of a module of 16 bits."""
    packed, sizes = PackedExperts(own), sizes_of(own)
    assert sizes is not None

    def projection(outputs: int, inputs: int) -> Projection:
        data = torch.randint(0, 256, (sizes.experts, outputs, inputs // 2), dtype=torch.uint8, device=device)
        # 2 ** (exponent - 127) times codes of about 2.9 are values of about inputs ** -0.5.
        exponent = round(127 + math.log2(inputs**-0.5 / 2.9))
        grid = sizes.experts, outputs, inputs // 32
        return Projection(data, pad_rows(torch.full(grid, exponent, dtype=torch.uint8, device=device)))

    gate_up, down = projection(2 * sizes.width, sizes.hidden), projection(sizes.hidden, sizes.width)
    packed.fill(PackedWeights(gate_up, down, "mxfp4", Block(1, 32)))
    for bias in packed.parameters():  # transformers initialises those of its own classes
        torch.nn.init.zeros_(bias)
    return packed


@contextmanager
def quantised_from_the_beginning(kind: str | None, dtype: torch.dtype, device: str) -> Iterator[None]:
    """Projections of models that are built meanwhile, but for heads and routers, get random quantised weights; each
    takes the place of its linear layer at once, so that the whole model is never there in 16 bits. With `mxfp4` experts
    do, and projections keep 16 bits, as in gpt-oss's checkpoints."""

    def replaced(_: torch.nn.Module, name: str, linear: torch.nn.Module | None) -> torch.nn.Module | None:
        if kind == "mxfp4":
            return None if linear is None or sizes_of(linear) is None else random_experts(linear, device)
        if type(linear) is not torch.nn.Linear or not name.endswith("_proj"):
            return None
        place = QuantisedLinear(linear.in_features, linear.out_features, linear.bias is not None)
        place.bias = linear.bias
        place.fill(random_weight(str(kind), linear.out_features, linear.in_features, dtype, device))
        return place

    hook = None if kind is None else register_module_module_registration_hook(replaced)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def random_model(
    name: str,
    dtype: torch.dtype,
    device: str,
    join: bool = True,
    quantised: str | None = None,
    quantised_head: str | None = None,
    layers: int | None = None,
) -> PreTrainedModel:
    """A model of that shape with random weights from seed 0, made on the device.

    Its projections are joined, as those of a model that an engine loads itself; a live module's are left as they are.

    Args:
        join: False leaves them apart.
        quantised: the kind of its projections' weights; None: 16 bits.
        quantised_head: the same of its head.
        layers: only the first of them.
    """
    torch.manual_seed(0)
    config = shape_config(name)
    config.eos_token_id = None
    if layers is not None:
        shorten(config, layers)
    with torch.device(device), quantised_from_the_beginning(quantised, dtype, device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if quantised_head is not None:  # which may be tied to the embedding, so that it is there first
        head = model.get_output_embeddings()
        place = QuantisedLinear(head.in_features, head.out_features, bias=False)
        place.fill(random_weight(quantised_head, head.out_features, head.in_features, dtype, device))
        model.set_output_embeddings(place)
    if join:
        fuse_projections(model)
    return model


def random_decoder(
    name: str, dtype: torch.dtype, device: str, max_context: int, share: Share | None = None, layers: int | None = None
) -> Decoder:
    """A `Decoder` of that shape with random weights from seed 0, made on the device without Hugging Face's model.

    Args:
        layers: only the first of them.
        share: the ranks, of which it is one's share; all have the same numbers.
    """
    ranks = 1 if share is None else share.size
    config: Any = shape_config(name)
    if layers is not None:
        shorten(config, layers)
    generator = torch.Generator(device).manual_seed(0)
    hidden, width, dim = config.hidden_size, config.intermediate_size // ranks, config.head_dim
    heads, keys = config.num_attention_heads // ranks, config.num_key_value_heads // ranks

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=device).normal_(0, columns**-0.5, generator=generator)

    def linear(values: torch.Tensor) -> Linear:
        return Linear(DenseWeight(values))

    def norm(size: int) -> Norm:
        return Norm(torch.ones(size, device=device), 1e-6)

    has_head_norms = isinstance(config, Qwen3Config)
    layers = tuple(
        DecoderLayer(
            before_attention=norm(hidden),
            qkv=linear(weight((heads + 2 * keys) * dim, hidden)),
            query_norm=norm(dim) if has_head_norms else None,
            key_norm=norm(dim) if has_head_norms else None,
            rotates=True,
            attention_scale=dim**-0.5,
            window=0,
            out=linear(weight(hidden, heads * dim)),
            after_attention=None,
            before_mlp=norm(hidden),
            gate_up=linear(weight(2 * width, hidden)),
            down=linear(weight(hidden, width)),
            after_mlp=None,
            residual=1.0,
        )
        for _ in range(config.num_hidden_layers)
    )
    powers = -torch.arange(dim // 2, device=device) / (dim // 2)
    angles = torch.arange(max_context, device=device)[:, None] * config.rope_parameters["rope_theta"] ** powers
    embedding = weight(config.vocab_size, hidden)
    return Decoder(
        hidden=hidden,
        heads=heads,
        kv_heads=keys,
        head_dim=dim,
        intermediate=width,
        vocab=config.vocab_size // ranks,
        activation="silu",
        embedding=embedding,
        embedding_scale=1.0,
        layers=layers,
        norm=norm(hidden),
        head=linear(embedding if config.tie_word_embeddings else weight(config.vocab_size // ranks, hidden)),
        logits_scale=1.0,
        rotary=(angles.cos().float(), angles.sin().float()),
        max_context=max_context,
        dtype=dtype,
        share=share,
    )


def held_out_files() -> list[str]:
    """Texts of the library's files that the demo model was not trained on, of those that this Python has."""
    names = json.loads((model_path() / "training.json").read_text())["corpus"]["held_out_files"]
    library = Path(sysconfig.get_paths()["stdlib"])
    return [(library / name).read_text() for name in names if (library / name).exists()]


def this_device() -> str:
    """CUDA where there is one. A CPU gets one thread: what runs there is tiny, and threads would only wait."""
    if torch.cuda.is_available():
        return "cuda"
    torch.set_num_threads(1)
    return "cpu"


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Median wall time of whole calls, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """Of times in seconds: median, 90th and 99th percentile (nearest rank), mean and largest, in microseconds."""
    ordered = sorted(times)

    def rank(share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)] * 1e6

    return {
        "p50_us": statistics.median(ordered) * 1e6,
        "p90_us": rank(0.9),
        "p99_us": rank(0.99),
        "mean_us": statistics.fmean(ordered) * 1e6,
        "max_us": ordered[-1] * 1e6,
    }


@contextmanager
def timing(owner: Any, name: str) -> Iterator[list[float]]:
    """The seconds of each call of an object's method meanwhile."""
    method = getattr(owner, name)
    times: list[float] = []
    clock = time.perf_counter

    def timed(*args: Any) -> Any:
        start = clock()
        result = method(*args)
        times.append(clock() - start)
        return result

    setattr(owner, name, timed)
    try:
        yield times
    finally:
        delattr(owner, name)


def random_prompts(batch: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Random ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (batch, length), generator=generator).tolist()


def how_it_ran(engine: hybridgen.Engine) -> dict[str, Any]:
    """What an engine's statistics say about compilation and graphs, for a result."""
    values = engine.stats().as_dict()
    return {name: values[name] for name in ("startup", "compiled", "late_compiles", "fallbacks", "graphs", "steps")}


def release() -> None:
    """Between two engines of one process: forget compiled functions and give memory back."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def provenance() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    facts: dict[str, Any] = {
        "hybridgen": hybridgen.__version__,
        # Where a copy without its history runs, the caller says which commit it is.
        "commit": os.environ.get("HYBRIDGEN_COMMIT") or _output("git", "rev-parse", "--short", "HEAD"),
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.cuda.is_available():
        import triton

        facts |= {
            "triton": triton.__version__,
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def write(results: dict[str, Any], output: Path | None) -> None:
    """Write results to a file, in one piece: what was there before stays whole until then."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        part = output.with_name(output.name + ".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        part.replace(output)


def report(results: dict[str, Any], output: Path | None) -> None:
    """Print the results as one JSON line, with provenance, and write them to a file."""
    results = {"provenance": provenance(), **results}
    print(json.dumps(results))
    write(results, output)
