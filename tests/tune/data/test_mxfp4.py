"""Originals whose experts are in MXFP4: read as the bfloat16 weights that they stand for."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pvrt.errors import SourceError
from pvrt_tune.data.source_model import load_source
from tests.fixtures.decoders import decoder
from tests.fixtures.toy import toy_tokenizer
from tests.tune.data.test_fp8 import describe

FUSED = ("gate_up_proj", "down_proj")


def in_mxfp4(folder: Path) -> dict[str, Tensor]:
    """Write gpt-oss as it is published. Returns its fused weights [experts, in, out]."""
    decoder("gpt_oss").to(torch.bfloat16).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    stored, dense = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [key for key in stored if key.endswith(FUSED)]:
        count, inputs, out = stored.pop(name).shape
        shape = count, out, inputs // 32
        blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 126, shape, generator=generator, dtype=torch.uint8)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        dense[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    describe(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return dense


def test_experts_are_dequantised_one_by_one(tmp_path: Path) -> None:
    """As transformers does, which has them transposed and gate and up in turn."""
    dense = in_mxfp4(tmp_path)
    source = load_source(str(tmp_path))
    assert any("MXFP4" in note for note in source.notes)
    assert not hasattr(source.model.config, "quantization_config")
    for name, fused in dense.items():
        prefix, _, leaf = name.rpartition(".")
        for expert, weight in enumerate(fused):
            parts = {"down_proj": weight}
            if leaf == "gate_up_proj":
                parts = {"gate_proj": weight[:, ::2], "up_proj": weight[:, 1::2]}
            for part, expected in parts.items():
                own = f"{prefix}.{expert}.{part}.weight"
                assert torch.equal(source.read([own])[own], expected.T)


def test_blocks_without_scales_are_named(tmp_path: Path) -> None:
    in_mxfp4(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SourceError, match=r"layers\.1\.mlp\.experts\.down_proj_blocks has no scales"
    ):
        load_source(str(tmp_path))
