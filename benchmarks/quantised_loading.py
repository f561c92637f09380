"""How long does a quantised checkpoint load, and how much device memory does quantising while loading take?

Writes a checkpoint of random weights in a model's shape, whose files are in the page cache then. `w4a16`: seconds of
`Checkpoint.load()` of a compressed-tensors checkpoint of four bits, over seconds of reading its files' bytes, and over
reading them and copying them to the device; as safetensors reads them, and with large tensors read by threads. `int4`:
the peak of the device memory that torch allocated while a 16-bit checkpoint is loaded with `quantization="int4"`, over
what is allocated in the end.

    python benchmarks/quantised_loading.py w4a16 [--model llama-3.1-8b] [--directory DIR] [--output w4a16.json]
    python benchmarks/quantised_loading.py int4 [--model llama-3.1-8b] [--directory DIR] [--output int4.json]
    python benchmarks/quantised_loading.py --smoke          # both, tiny, on the CPU: checks the script
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import report, shape_config, synchronize, this_device
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import hybridgen
from hybridgen.loading import Checkpoint
from hybridgen.loading.stored import TensorFiles

GROUP = 128
SHARD_BYTES = 2**31
CHUNK = 64 * 2**20
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
        }
    },
}


def w4a16(name: str, shape: torch.Size, device: str) -> dict[str, Tensor]:
    """A projection of four bits with random codes, by the names of its tensors."""
    outputs, inputs = shape
    words = torch.randint(-(2**31), 2**31, (outputs, -(-inputs // 8)), dtype=torch.int32, device=device)
    scales = torch.full((outputs, -(-inputs // GROUP)), inputs**-0.5 / 4.6, dtype=torch.bfloat16)
    return {
        f"{name}_packed": words.cpu(),
        f"{name}_scale": scales,
        f"{name}_shape": torch.tensor([outputs, inputs]),
    }


def write(model: str, path: Path, packed: bool, device: str) -> list[Path]:
    """A checkpoint of random weights, in shards; returns its weight files."""
    config = shape_config(model)
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).named_parameters())
    shard: dict[str, Tensor] = {}
    files: list[Path] = []
    places: dict[str, str] = {}

    def flush() -> None:
        if shard:
            files.append(path / f"model-{len(files) + 1:05}.safetensors")
            save_file(shard, files[-1], metadata={"format": "pt"})
            places.update(dict.fromkeys(shard, files[-1].name))
            shard.clear()

    for name, parameter in parameters.items():
        if packed and name.endswith("_proj.weight"):
            shard |= w4a16(name, parameter.shape, device)
        else:
            values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            shard[name] = (values.normal_(0, 0.02) if parameter.dim() > 1 else values.fill_(1)).cpu()
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": sum(file.stat().st_size for file in files)}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    values = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(values | ({"quantization_config": CONFIG} if packed else {})))
    return files


def read_seconds(files: list[Path], device: str) -> tuple[float, float]:
    """Seconds of reading all bytes into one buffer, and of copying each part to the device too, from pinned memory."""
    found = []
    for copies in (False, True):
        buffer = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=copies and device == "cuda")
        target = torch.empty(CHUNK, dtype=torch.uint8, device=device)
        view = memoryview(buffer.numpy())
        synchronize(device)
        begin = time.perf_counter()
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while count := stream.readinto(view):
                    if copies:
                        target[:count].copy_(buffer[:count])
        synchronize(device)
        found.append(time.perf_counter() - begin)
    return found[0], found[1]


def load(path: Path, device: str, **fields: Any) -> dict[str, Any]:
    """Load a checkpoint, and say what it took."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = hybridgen.EngineConfig(device=device, progress=False, **fields)
    opened = Checkpoint.open(path, config)
    loaded = opened.load()
    row: dict[str, Any] = {"open_seconds": opened.seconds, "load_seconds": loaded.seconds, "notes": dict(loaded.notes)}
    if device == "cuda":
        row["peak_bytes"], row["final_bytes"] = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        row["peak_over_final"] = row["peak_bytes"] / row["final_bytes"]
    return row


def measure(what: str, model: str, path: Path, device: str) -> dict[str, Any]:
    """One of the two questions, with the checkpoint at `path`, which is made."""
    path.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    files = write(model, path, what == "w4a16", device)
    size = sum(file.stat().st_size for file in files)
    print(f"{what}: {size / 1e9:.2f} GB written in {time.perf_counter() - begin:.1f} s", flush=True)
    row: dict[str, Any] = {"what": what, "model": model, "bytes": size}
    if what == "int4":
        row |= load(path, device, quantization="int4")
        print(f"int4: loaded in {row['load_seconds']:.1f} s, peak over final {row.get('peak_over_final')}", flush=True)
        return row
    read_seconds(files, device)  # whatever is not in the page cache yet
    reads = [read_seconds(files, device) for _ in range(3)]
    row["read_seconds"], row["copy_seconds"] = (statistics.median(each) for each in zip(*reads, strict=True))
    row["ways"] = []
    for threads in (False, True):
        TensorFiles.by_threads = threads
        rows = [load(path, device) for _ in range(4)]  # the first one starts the device's kernels and imports
        took = [each["load_seconds"] for each in rows]
        way = {**rows[-1], "threads": threads, "loads_seconds": took, "load_seconds": statistics.median(took[1:])}
        way |= {f"over_{what}": way["load_seconds"] / row[f"{what}_seconds"] for what in ("read", "copy")}
        row["ways"].append(way)
        print(
            f"w4a16{', by threads' if threads else ''}: loaded in {way['load_seconds']:.2f} s (the first time "
            f"{took[0]:.2f}), its bytes read in {row['read_seconds']:.2f} s, read and copied in "
            f"{row['copy_seconds']:.2f} s: {way['over_read']:.2f} and {way['over_copy']:.2f} times",
            flush=True,
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="w4a16, int4, or both")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--directory", type=Path, help="where checkpoints are written; removed in the end")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    device = "cpu" if args.smoke else this_device()
    wanted = args.what or ["w4a16", "int4"]
    for what in wanted:
        if what not in ("w4a16", "int4"):
            parser.error(f"{what!r} is neither w4a16 nor int4")
    torch.manual_seed(0)
    rows = []
    for what in wanted:
        place = args.directory or Path(tempfile.mkdtemp())
        try:
            rows.append(measure(what, "tiny" if args.smoke else args.model, place / what, device))
        finally:
            shutil.rmtree(place / what, ignore_errors=True)
            with contextlib.suppress(OSError):
                place.rmdir()
    report({"benchmark": "quantised loading", "rows": rows}, args.output)


if __name__ == "__main__":
    main()
