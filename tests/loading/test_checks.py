"""Broken checkpoint files are found from their headers, and named."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hybridgen.errors import CheckpointError
from hybridgen.loading.checks import read_header, read_json, validate_directory

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"


def weights_file(path: Path) -> Path:
    file = path / "model.safetensors"
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros(0)}, file)
    return file


def raw_file(path: Path, header: object, data: int) -> Path:
    """A file with a hand-made header and that many bytes after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return file


def test_a_whole_file_passes_and_its_header_is_read(tmp_path: Path) -> None:
    file = weights_file(tmp_path)
    assert validate_directory(tmp_path, allow_pickle=False) == [file]
    header = read_header(file)
    assert {name: (e.dtype, e.shape, e.numel) for name, e in header.items()} == {
        "a": ("F32", (3, 4), 12),
        "b": ("BF16", (5,), 5),
        "c": ("F32", (0,), 0),
    }


def test_every_truncation_is_found(tmp_path: Path) -> None:
    file = weights_file(tmp_path)
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
            validate_directory(tmp_path, allow_pickle=False)
    file.write_bytes(whole)
    validate_directory(tmp_path, allow_pickle=False)


def test_only_the_header_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    header = json.dumps({"a": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with open(file, "r+b") as stream:
        stream.truncate(8 + len(header) + (1 << 40))  # a sparse file of a tebibyte
    assert read_header(file)["a"].numel == 1 << 40


def test_bytes_after_the_last_tensor_are_found(tmp_path: Path) -> None:
    file = weights_file(tmp_path)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt: 1 bytes follow"):
        validate_directory(tmp_path, allow_pickle=False)


def entry(start: int, end: int, **changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end], **changes}


@pytest.mark.parametrize(
    ("header", "data", "problem"),
    [
        (b"not json" * 4, 0, "header cannot be read"),
        (b"\xff\xfe{}", 0, "header cannot be read"),
        ([1, 2], 0, "header cannot be read"),
        ({"a": 7}, 0, "header cannot be read"),
        ({"a": {"dtype": "U8", "shape": [4]}}, 4, "header cannot be read"),
        ({"a": entry(0, 4, shape=[-4])}, 4, "header cannot be read"),
        ({"a": entry(0, 4, shape="4")}, 4, "header cannot be read"),
        ({"a": entry(0, 4, data_offsets=[0.0, 4])}, 4, "header cannot be read"),
        ({"a": entry(0, 4), "b": entry(6, 8)}, 8, "'b' do not follow"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "'b' do not follow"),
        ({"a": entry(2, 4)}, 4, "'a' do not follow"),
        ({"a": entry(0, 4, shape=[5])}, 4, r"'a' is U8 \[5\] in 4 bytes"),
        ({"a": entry(0, 4, dtype="F32")}, 4, r"'a' is F32 \[4\] in 4 bytes"),
    ],
)
def test_corrupt_headers_are_found(tmp_path: Path, header: object, data: int, problem: str) -> None:
    raw_file(tmp_path, header, data)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors is corrupt.*{problem}"):
        validate_directory(tmp_path, allow_pickle=False)


def test_a_hand_made_header_that_is_right_passes(tmp_path: Path) -> None:
    """So the cases above fail for what they change, not for how the file is made."""
    file = raw_file(tmp_path, {"__metadata__": {"format": "pt"}, "a": entry(0, 4), "b": entry(4, 6)}, 6)
    assert validate_directory(tmp_path, allow_pickle=False) == [file]


def test_garbage_is_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 4096)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        validate_directory(tmp_path, allow_pickle=False)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_git_lfs_pointers_are_named_as_such(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        validate_directory(tmp_path, allow_pickle=True)


# Shards


def test_whole_shards_pass(sharded: Path) -> None:
    files = validate_directory(sharded, allow_pickle=False)
    assert len(files) > 2
    assert files == sorted(sharded.glob("*.safetensors"))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json.*of which 1 are missing: {gone.name}"):
        validate_directory(sharded, allow_pickle=False)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    last = sorted(sharded.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{last.name} is truncated"):
        validate_directory(sharded, allow_pickle=False)


def test_a_tensor_that_the_index_promises_must_be_there(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    first = sorted(set(values["weight_map"].values()))[0]
    values["weight_map"]["model.ghost"] = first
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"in {first} that it does not have: model\.ghost"):
        validate_directory(sharded, allow_pickle=False)


@pytest.mark.parametrize("weight_map", [..., {}, [], "x", {"a": 3}])
def test_an_index_without_a_usable_map_is_refused(
    sharded: Path, edit_json: Callable[..., None], weight_map: object
) -> None:
    edit_json(sharded / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        validate_directory(sharded, allow_pickle=False)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", ""])
def test_an_index_cannot_lead_out_of_its_directory(sharded: Path, edit_json: Callable[..., None], name: str) -> None:
    edit_json(sharded / "model.safetensors.index.json", weight_map={"a": name})
    with pytest.raises(CheckpointError, match="outside its directory"):
        validate_directory(sharded, allow_pickle=False)


def test_an_index_that_is_not_json_is_named(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {')
    with pytest.raises(CheckpointError, match=r"index\.json is not valid JSON"):
        validate_directory(sharded, allow_pickle=False)


# Other files


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no weights: no model\.safetensors"):
        validate_directory(tmp_path, allow_pickle=False)
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found: consolidated\.safetensors"):
        validate_directory(tmp_path, allow_pickle=False)
    (tmp_path / "model.safetensors").symlink_to("blobs/gone")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a link to 'blobs/gone', which is not there"):
        validate_directory(tmp_path, allow_pickle=False)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no file"):
        validate_directory(tmp_path, allow_pickle=False)


def test_bin_weights_need_consent(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        validate_directory(tmp_path, allow_pickle=False)
    assert validate_directory(tmp_path, allow_pickle=True) == [file]
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is truncated"):
        validate_directory(tmp_path, allow_pickle=True)
    file.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="not a file of PyTorch weights"):
        validate_directory(tmp_path, allow_pickle=True)


def test_safetensors_come_before_bin(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    assert validate_directory(tmp_path, allow_pickle=True) == [tmp_path / "pytorch_model.bin"]
    file = weights_file(tmp_path)
    assert validate_directory(tmp_path, allow_pickle=True) == [file]


def test_a_named_weight_file_is_taken_instead(tmp_path: Path) -> None:
    file = weights_file(tmp_path).rename(tmp_path / "other.safetensors")
    assert validate_directory(tmp_path, False, "other.safetensors") == [file]
    with pytest.raises(CheckpointError, match="outside its directory"):
        validate_directory(tmp_path, False, "../other.safetensors")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"{", "not valid"), (b"[]", "JSON list"), (POINTER, "Git LFS"), (None, "cannot be read")],
)
def test_json_files_are_named_when_broken(tmp_path: Path, content: bytes | None, problem: str) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{problem}"):
        read_json(file)
