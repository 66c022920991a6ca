"""What a step of PV-Tuning has in C, against autograd and float64, on every instruction set."""

import pytest
import torch
from torch import Tensor

from pvrt.format.scheme import Scheme
from pvrt_kernels import aqlm_dequantize, aqlm_parameter_grads
from pvrt_kernels.cpu import pv_step
from tests.fixtures.toy import random_layer

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("scheme", ["2x8g8", "1x16g8", "1x7g8", "2x8g16", "3x4g4"])
def test_gradients_are_those_of_autograd(scheme: str) -> None:
    layer = random_layer(Scheme.parse(scheme), 37, 96, seed=1, dtype=torch.float32)
    books, scales = layer.codebooks.double(), layer.scales.double()
    grad = torch.randn(37, 96)
    books.requires_grad_(), scales.requires_grad_()
    exact = aqlm_dequantize(layer.codes, books, scales)  # in torch: the kernel takes no doubles
    expected = torch.autograd.grad(exact, (books, scales), grad.double())
    assert pv_step.can_gather(grad, layer.codes, layer.codebooks)
    before = torch.get_num_threads()
    for threads in (1, 3):
        try:
            torch.set_num_threads(threads)
            found = aqlm_parameter_grads(grad, layer.codes, layer.codebooks, layer.scales)
        finally:
            torch.set_num_threads(before)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [1, 3, 8, 16])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_latent_takes_the_step_of_lamb(group: int, threads: int) -> None:
    torch.manual_seed(0)
    latent, grad, decoded = (torch.randn(40, 240) for _ in range(3))
    moment = torch.rand(40, 240)
    moment[:, 7], grad[:, 7] = 0, 0  # an input that never came
    root = (0.9 * moment.double() + 0.1 * grad.double().square()).sqrt()
    direction = grad.double() / (root + 1e-12)
    squares = torch.stack([latent.double().square().sum(), direction.square().sum()])
    expected = latent.double() - 0.25 * direction
    asked = []

    def rate(sums: Tensor) -> float:
        asked.append(sums)
        return 0.25

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert pv_step.can_step(latent, grad, moment, decoded)
        distance = pv_step.latent_step(latent, grad, moment, decoded, group, 0.9, rate)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(asked[0], squares, rtol=1e-5, atol=0)
    torch.testing.assert_close(moment.double().sqrt(), root, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(latent.double(), expected, rtol=1e-6, atol=1e-6)
    away = torch.linalg.vector_norm((expected - decoded).view(-1, group), dim=1)
    torch.testing.assert_close(distance.double(), away, rtol=1e-5, atol=1e-6)


def test_latents_that_the_kernel_does_not_take() -> None:
    whole = torch.empty(4, 8)
    assert pv_step.can_step(whole)
    assert not pv_step.can_step(whole, whole.bfloat16())
    assert not pv_step.can_step(whole.T)
    assert not pv_step.can_step(torch.empty(3, 5))
