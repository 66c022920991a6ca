"""Models of which a part stays on the disk."""

from pathlib import Path

import torch

import pvrt
from tests.fixtures.toy import write_toy


def test_layers_on_the_disk_compute_what_others_do(tmp_path: Path) -> None:
    write_toy(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    tokens, own = torch.arange(16)[None], torch.float32
    model = pvrt.load(
        tmp_path / "model", dtype=own, device_map=places, offload_folder=str(tmp_path / "off")
    )
    assert model.get_parameter("model.layers.1.mlp.up_proj.codes").is_meta
    with torch.inference_mode():
        wanted = pvrt.load(tmp_path / "model", dtype=own)(tokens).logits
        assert torch.equal(model(tokens).logits, wanted)
