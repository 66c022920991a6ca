"""One step: how far it goes."""

import pytest
import torch

from pvrt.format.scheme import Scheme
from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt_tune.pv.optimizer import PVOptimizer
from pvrt_tune.pv.representation import represent
from pvrt_tune.settings import PVSettings
from tests.fixtures.toy import random_layer


@pytest.mark.parametrize(("scheme", "share"), [("2x4g8", 1), ("2x8g8", 1), ("3x8g8", 0.5)])
def test_a_layer_of_more_bits_takes_smaller_steps(scheme: str, share: float) -> None:
    torch.manual_seed(0)
    quantised = random_layer(Scheme.parse(scheme), 24, 32)
    layer = AQLMLinear(32, 24, Scheme.parse(scheme))
    for part in ("codes", "codebooks", "scales"):
        layer.get_parameter(part).data = getattr(quantised, part)
    representation, settings = represent(layer), PVSettings(clip_norm=1e9)
    weight = torch.nn.Parameter(representation.decode())
    norm = torch.nn.Parameter(torch.ones(8))
    before, books = representation.decode(), representation.continuous()["codebooks"].clone()
    optimizer = PVOptimizer({"layer": representation}, {"layer": weight}, {"norm": norm}, settings)
    weight.grad, norm.grad = torch.randn_like(weight), torch.ones_like(norm)
    optimizer.step(1.0, torch.Generator().manual_seed(0))
    rate = share * settings.learning_rate
    torch.testing.assert_close(norm.detach(), torch.full_like(norm, 1 - rate))
    moved = (representation.continuous()["codebooks"] - books).abs().amax()
    assert float(moved) == pytest.approx(rate * float(books.square().mean().sqrt()), rel=1e-3)
    latent = optimizer.layers["layer"].tensors()["latent"]
    away = float((latent - before).norm() / before.norm())
    assert away == pytest.approx(share * settings.code_learning_rate, rel=0.05)
