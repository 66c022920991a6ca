"""What tuning has in C, against every sum and float64, on every instruction set."""

import pytest
import torch
from torch import Tensor

from pvrt.format.scheme import Scheme
from pvrt_kernels import aqlm_dequantize, aqlm_parameter_grads
from pvrt_kernels.cpu import pv_step
from tests.fixtures.toy import random_layer

pytestmark = pytest.mark.usefixtures("isa")


def all_sums(books: Tensor) -> Tensor:
    """Every sum of one entry of each book, by codes in row-major order."""
    total = books[0]
    for book in books[1:]:
        total = (total.unsqueeze(1) + book).flatten(0, 1)
    return total


def chosen(books: Tensor, codes: Tensor) -> Tensor:
    return torch.stack([book[codes[..., m]] for m, book in enumerate(books)]).sum(0)


def falling_books(number: int, size: int, group: int) -> Tensor:
    """Later books are smaller, as residual quantisation makes them."""
    torch.manual_seed(number * size + group)
    return torch.randn(number, size, group) * 0.4 ** torch.arange(number).view(-1, 1, 1)


@pytest.mark.parametrize(
    ("number", "size", "group"), [(1, 256, 8), (1, 8, 3), (2, 256, 8), (2, 16, 4), (3, 16, 16)]
)
def test_the_nearest_of_all_sums_is_found(number: int, size: int, group: int) -> None:
    books = falling_books(number, size, group)
    wanted = chosen(books, torch.randint(size, (300, number))) + 0.2 * torch.randn(300, group)
    codes = pv_step.nearest_sums(wanted, books, beam=8, count=2)
    assert codes.shape == (300, 2, number)
    distance = torch.cdist(wanted, all_sums(books)).square()
    found = (wanted.unsqueeze(1) - chosen(books, codes)).square().sum(2)
    best = distance.topk(2, largest=False).values
    near = found <= best * (1 + 2**-14) + 1e-5
    # The search is exact in one book; of more it follows eight partial sums.
    assert bool(near.all()) if number == 1 else near.float().mean() > 0.9
    assert bool((codes[:, 0] != codes[:, 1]).any(1).all())


def test_values_that_are_sums_are_found_with_all_their_codes() -> None:
    books = falling_books(4, 64, 8)
    codes = torch.randint(64, (200, 4))
    found = pv_step.nearest_sums(chosen(books, codes), books, beam=8, count=1)[:, 0]
    error = (chosen(books, found) - chosen(books, codes)).square().sum(1)
    assert float((error < 1e-6).float().mean()) > 0.8  # one book after the other finds a fifth


def test_no_values_need_no_search() -> None:
    found = pv_step.nearest_sums(torch.empty(0, 8), falling_books(2, 256, 8), 8, 1)
    assert found.shape == (0, 1, 2)


@pytest.mark.parametrize(
    ("number", "size", "kept", "can"),
    [(2, 256, 1, True), (8, 8, 8, True), (1, 512, 1, False), (9, 8, 1, False), (1, 4, 1, False)],
)
def test_what_the_kernel_takes(number: int, size: int, kept: int, can: bool) -> None:
    assert pv_step.can_search(torch.empty(number, size, 8), kept) is can


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
