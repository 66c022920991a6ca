"""What `pvrt inspect` says of a checkpoint whose layers have several schemes."""

from pathlib import Path

import pytest

from pvrt.format.grid import open_checkpoint
from pvrt.tools.report import as_text, describe
from tests.fixtures.toy import write_toy


def test_bits_of_every_layer_and_kind_are_shown(tmp_path: Path) -> None:
    write_toy(tmp_path, "llama", "2x8g8", schemes={"layers.1.mlp.down_proj": "1x8g8"})
    checkpoint = open_checkpoint(tmp_path)
    report = describe(checkpoint)
    layers = report["layers"]
    assert set(layers) == set(checkpoint.layers)
    assert layers["model.layers.1.mlp.down_proj"]["scheme"] == "1x8g8"
    weights = sum(layer["weights"] for layer in layers.values())
    bits = sum(layer["bits_per_weight"] * layer["weights"] for layer in layers.values())
    assert bits / weights == pytest.approx(report["bits_per_weight_linears"])
    text = as_text(report)
    assert "mlp.down_proj: 1 x 1x8g8, 1 x 2x8g8" in text
    assert "self_attn.q_proj: 2 x 2x8g8" in text


def test_one_scheme_for_all_is_one_line(tmp_path: Path) -> None:
    write_toy(tmp_path, "llama", "2x8g8")
    assert "q_proj" not in as_text(describe(open_checkpoint(tmp_path)), shown=0)
