"""Checkpoints and packed layers on a device that is not the CPU."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import pvrt
from pvrt.cli import app
from pvrt.format.scheme import Scheme
from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt.modules.whole_model import pack_model
from pvrt_kernels import aqlm_linear, reference
from pvrt_kernels.gpu import launch
from tests.fixtures.simulated_device import NAME
from tests.fixtures.toy import random_layer, write_toy, write_toy_grid


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device") / "toy"
    write_toy(path, "llama", "2x8g8")
    return path


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dense", [False, True])
def test_a_checkpoint_computes_there_what_it_does_on_the_cpu(
    folder: Path, dense: bool, device: str
) -> None:
    ours, theirs = pvrt.load(folder, dense=dense), pvrt.load(folder, dense=dense).to(device)
    pack_model(theirs, torch.float32)  # there is no kernel: layers stay as they are
    with torch.inference_mode():
        logits = theirs(tokens().to(device)).logits
        torch.testing.assert_close(logits.cpu(), ours(tokens()).logits, rtol=1e-3, atol=1e-3)


def test_transformers_loads_a_checkpoint_onto_it(folder: Path, device: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device})
    assert {parameter.device.type for parameter in model.parameters()} == {NAME}
    with torch.inference_mode():
        logits = model(tokens().to(device)).logits
        expected = pvrt.load(folder)(tokens()).logits
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_layers_train_there(device: str) -> None:
    gradients = []
    for place in ("cpu", device):
        layer = AQLMLinear(64, 16, Scheme.parse("2x8g8"))
        stored = random_layer(layer.scheme, 16, 64)
        with torch.no_grad():
            for name in ("codes", "codebooks", "scales"):
                getattr(layer, name).copy_(getattr(stored, name))
        layer.to(place)(torch.ones(80, 64, device=place)).square().sum().backward()
        assert layer.codebooks.grad is not None and layer.scales.grad is not None
        gradients.append((layer.codebooks.grad.cpu(), layer.scales.grad.cpu()))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["2x8g8", "3x8g8", "5x8g4", "6x8g16", "3x16g8", "1x10g8"])
def test_the_layout_of_gpus_is_made_and_undone_on_the_device(scheme: str, device: str) -> None:
    layer = random_layer(Scheme.parse(scheme), 24, 48)
    given = layer.codes.to(device), layer.codebooks[None].to(device), layer.scales.to(device)
    codes, codebooks, scales = launch.unpack(launch.pack(*given, [24]), 48)
    assert {tensor.device.type for tensor in (codes, codebooks, scales)} == {NAME}
    x = torch.randn(70, 48, generator=torch.Generator().manual_seed(1))
    y = aqlm_linear(x.to(device), codes, codebooks, scales, None, [24])
    expected = reference.linear(x, layer.codes, layer.codebooks[None], layer.scales, None, [24])
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["aqlm", "grid"])
def test_eval_says_what_it_says_on_the_cpu(kind: str, tmp_path: Path, device: str) -> None:
    folder, text = tmp_path / "toy", tmp_path / "text.txt"
    if kind == "aqlm":
        write_toy(folder)
    else:
        write_toy_grid(folder, "llama", "w4g32")
    text.write_text("A text of some letters, long enough for two windows of thirty-two tokens.")
    found = []
    for place in ("cpu", device):
        options = ["--device", place, "--dtype", "float32", "--context", "32", "--json"]
        done = CliRunner().invoke(app, ["eval", str(folder), "--text", str(text), *options])
        assert done.exit_code == 0, done.output
        found.append(json.loads(done.stdout)["value"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
