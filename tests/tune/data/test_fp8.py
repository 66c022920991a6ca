"""Originals in FP8 with scales: read as the bfloat16 weights that they stand for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pvrt.errors import SourceError
from pvrt.format.aqlm import read_config
from pvrt.format.atomic import as_json
from pvrt_tune.data.source_model import load_skeleton, load_source
from tests.fixtures.toy import toy_model, toy_tokenizer

BLOCKS = [48, 64]  # neither divides all layers


def in_fp8(
    folder: Path, architecture: str, block: list[int] | None, suffix: str = "_scale_inv"
) -> dict[str, Tensor]:
    """Write a model with its layers in FP8. Returns what its tensors stand for."""
    toy_model(architecture).to(torch.bfloat16).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    dense = dict(stored)
    for name, weight in list(stored.items()):
        if weight.dim() != 2 or "_proj" not in name:
            continue
        steps = block or list(weight.shape)
        shape = [-(-length // step) for length, step in zip(weight.shape, steps, strict=True)]
        scales = torch.rand(shape, generator=torch.Generator().manual_seed(1)) / 100 + 0.001
        rows, columns = (torch.arange(n) // s for n, s in zip(weight.shape, steps, strict=True))
        each = scales[rows][:, columns]
        stored[name] = (weight.float() / each).clamp(-448, 448).to(torch.float8_e4m3fn)
        dense[name] = (stored[name].float() * each).to(torch.bfloat16)
        stored[f"{name}{suffix}"] = scales if block else scales.reshape(())
        stored[name.replace(".weight", ".activation_scale")] = torch.ones(())
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block}
    describe(folder, settings)
    return dense


def describe(folder: Path, quantization: dict[str, Any]) -> None:
    config = {**read_config(folder), "quantization_config": quantization}
    (folder / "config.json").write_bytes(as_json(config))


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("block", [BLOCKS, None])
@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_weights_are_dequantised(
    tmp_path: Path, architecture: str, block: list[int] | None, suffix: str
) -> None:
    expected = in_fp8(tmp_path, architecture, block, suffix)
    source = load_source(str(tmp_path))
    assert any("FP8" in note for note in source.notes)
    assert not hasattr(source.model.config, "quantization_config")
    model = source.dense()
    found = dict(model.state_dict())
    assert found.keys() <= expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype in (torch.bfloat16, torch.float32)
        assert torch.equal(tensor.to(torch.bfloat16), expected[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("opener", [load_source, load_skeleton])
def test_weights_without_scales_are_refused(tmp_path: Path, opener: Any) -> None:
    in_fp8(tmp_path, "llama", BLOCKS)
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    scales = tensors.pop(f"{name}_scale_inv")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=rf"{name} is stored as F8_E4M3 without scales"):
        opener(str(tmp_path))
    save_file({**tensors, f"{name}_scale_inv": scales[:1]}, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=rf"{name}_scale_inv has another shape"):
        opener(str(tmp_path))


def test_other_quantisations_are_refused(tmp_path: Path) -> None:
    in_fp8(tmp_path, "llama", BLOCKS)
    describe(tmp_path, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(SourceError, match=r"already quantised \(gptq\)"):
        load_source(str(tmp_path))
