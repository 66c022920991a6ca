"""Checkpoints that were damaged after they were written: `verify` knows them by their hashes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from pvrt.errors import CheckpointError
from pvrt.format.grid import open_checkpoint
from tests.fixtures.toy import write_toy, write_toy_grid

LAYOUTS: dict[str, Callable[[Path], object]] = {
    "codes": lambda path: write_toy(path, "qwen2", embeddings="2x8g8"),
    "grid": lambda path: write_toy_grid(path, "qwen2", "w4g32"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_flipped_bit_in_any_tensor_is_found(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    open_checkpoint(tmp_path).verify()
    with safe_open(file, framework="pt") as handle:
        names = list(handle.keys())  # the header has its metadata, too
    for name in names:
        first, end = header[name]["data_offsets"]
        flipped = bytearray(data)
        flipped[start + (first + end) // 2] ^= 1  # the lowest bit of a float, or of a code
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError) as refused:
            open_checkpoint(tmp_path).verify()
        assert name.removesuffix("weight_shape") in str(refused.value)


@pytest.mark.parametrize(
    ("hashes", "sentence"),
    [
        (["a"], "tensor_sha256 must map names to hashes"),
        ({"model.norm.weight": 5}, "is not what was written"),
        ("all", "tensor_sha256 must map names to hashes"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(tmp_path: Path, hashes: object, sentence: str) -> None:
    write_toy(tmp_path)
    (tmp_path / "pvrt.json").write_text(json.dumps({"tensor_sha256": hashes}))
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(tmp_path).verify()


def test_a_tensor_that_the_manifest_alone_has_is_missed(tmp_path: Path) -> None:
    write_toy(tmp_path)
    file = tmp_path / "pvrt.json"
    manifest = json.loads(file.read_text())
    manifest["tensor_sha256"]["model.layers.0.lost"] = "0" * 64
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.lost"):
        open_checkpoint(tmp_path).verify()


def test_folders_of_others_have_no_hashes(tmp_path: Path) -> None:
    write_toy(tmp_path, published=True)
    open_checkpoint(tmp_path).verify()
