"""Ranges of files that threads read, and tensors of checkpoints that are read so."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hybridgen.errors import CheckpointError
from hybridgen.loading import device_reads, stored
from hybridgen.loading.device_reads import DeviceReads, ShortReadError
from hybridgen.loading.stored import TensorFiles

CPU = torch.device("cpu")


def test_ranges_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no byte, of a part of a buffer, of many buffers; and by several threads at once."""
    monkeypatch.setattr(device_reads, "_CHUNK", 1000)
    values = torch.randint(0, 256, (50_000,), dtype=torch.uint8)
    path = tmp_path / "file"
    path.write_bytes(values.numpy().tobytes())
    reads = DeviceReads(CPU)

    def read(begin: int, end: int) -> torch.Tensor:
        target = torch.full((end - begin,), 7, dtype=torch.uint8)
        reads.read(path, begin, target)
        return target

    ranges = [(0, 0), (3, 4), (17, 999), (0, 1000), (5, 48_123), (49_999, 50_000)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: read(*each), ranges * 3))
    with torch.inference_mode():
        found.append(read(2, 9_000))
    ranges = [*ranges * 3, (2, 9_000)]
    for (begin, end), each in zip(ranges, found, strict=True):
        assert torch.equal(each, values[begin:end])
    with pytest.raises(ShortReadError, match="ends at byte 50000"):
        read(49_000, 50_500)
    assert torch.equal(read(1, 40_000), values[1:40_000]), "buffers are given back after an error"
    reads.close()


def test_tensors_are_those_of_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, but for the device; a file that lost its end is one error of ours."""
    monkeypatch.setattr(stored, "DeviceReads", lambda device: DeviceReads(CPU))
    monkeypatch.setattr(torch, "empty", lambda *args, device=None, _empty=torch.empty, **kw: _empty(*args, **kw))
    monkeypatch.setattr(stored, "LEAST", 10)
    monkeypatch.setattr(TensorFiles, "by_threads", True)
    tensors = {
        "a": torch.randn(30, 70).bfloat16(),
        "b": torch.randint(-9, 9, (400, 5), dtype=torch.int32),
        "c": torch.randn(64, 8).to(torch.float8_e4m3fn),
        "small": torch.ones(2),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    device = torch.device("cuda", 0)
    with TensorFiles([path]) as files:
        for name in ("a", "b", "c"):
            lazy = files.lazy(name, device)
            assert lazy.get_shape() == list(tensors[name].shape)
            found = lazy[...]
            assert found.dtype == tensors[name].dtype
            assert torch.equal(found.view(torch.uint8), tensors[name].view(torch.uint8))
        assert files.dtype_of("a") is torch.bfloat16
        assert torch.equal(files.lazy("small")[...], tensors["small"])
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 100)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: '.*' cannot be read"):
            [files.read(name, device) for name in ("a", "b", "c")]
