"""The latent weight: its step in C and in torch, and what it keeps."""

import pytest
import torch
from torch import Tensor

from pvrt_kernels.cpu import pv_step
from pvrt_tune.pv.latent import Latent


def steps(latent: Latent, decoded: Tensor, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Copies of what some steps return: B and its distance from the weight."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        grad = torch.randn(decoded.shape, generator=generator)
        target, distance = latent.step(decoded, grad, 0.1, generator)
        found.append((target.clone(), distance))
    return found


@pytest.mark.parametrize("accumulates", [True, False])
def test_steps_in_c_and_in_torch_are_the_same(
    accumulates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    ours = Latent(decoded, 8, 0.9, accumulates=accumulates, low_memory=False)
    in_c = steps(ours, decoded)
    monkeypatch.setattr(pv_step, "can_step", lambda *tensors: False)
    theirs = Latent(decoded, 8, 0.9, accumulates=accumulates, low_memory=False)
    in_torch = steps(theirs, decoded)
    for one, other in zip(in_c, in_torch, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.tensors(), theirs.tensors(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("low_memory", [True, False])
def test_only_what_accumulates_outlives_a_step(low_memory: bool) -> None:
    decoded = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    before = decoded.clone()
    kept = steps(Latent(decoded, 8, 0.9, accumulates=True, low_memory=low_memory), decoded)
    anew = steps(Latent(decoded, 8, 0.9, accumulates=False, low_memory=low_memory), decoded)
    # A step is a tenth of the norm long; steps of random directions add up to its double in four.
    size = float(decoded.norm())
    lengths = [float((target - decoded).norm()) / size for target, _ in anew]
    assert lengths == pytest.approx([0.1] * 4, rel=1e-4)
    assert float((kept[-1][0] - decoded).norm()) / size == pytest.approx(0.2, rel=0.15)
    assert torch.equal(decoded, before)
    for target, distance in (*kept, *anew):
        away = (target - decoded).view(-1, 8).norm(dim=1)
        torch.testing.assert_close(distance, away, rtol=1e-4, atol=1e-5)
