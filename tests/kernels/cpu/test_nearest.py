"""Searches in C, against every sum and score, on every instruction set."""

import pytest
import torch
from torch import Tensor

from pvrt_kernels.cpu import nearest

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
    codes = nearest.nearest_sums(wanted, books, beam=8, count=2)
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
    found = nearest.nearest_sums(chosen(books, codes), books, beam=8, count=1)[:, 0]
    error = (chosen(books, found) - chosen(books, codes)).square().sum(1)
    assert float((error < 1e-6).float().mean()) > 0.8  # one book after the other finds a fifth


def test_no_values_need_no_search() -> None:
    found = nearest.nearest_sums(torch.empty(0, 8), falling_books(2, 256, 8), 8, 1)
    assert found.shape == (0, 1, 2)


@pytest.mark.parametrize(
    ("number", "size", "kept", "can"),
    [(2, 256, 1, True), (8, 8, 8, True), (1, 512, 1, False), (9, 8, 1, False), (1, 4, 1, False)],
)
def test_what_a_search_takes(number: int, size: int, kept: int, can: bool) -> None:
    assert nearest.can_search(torch.empty(number, size, 8), kept) is can


@pytest.mark.parametrize(("size", "length"), [(256, 16), (256, 8), (256, 3), (40, 5), (8, 1)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_lowest_score_is_found(size: int, length: int, offset: float) -> None:
    torch.manual_seed(size + length)
    rows, offsets = torch.randn(size, length), offset + torch.randn(size)
    features = torch.randn(777, length)  # no whole number of parts
    scores = offsets.double() + features.double() @ rows.double().T
    found = nearest.lowest_scores(features, rows, offsets)
    assert found.dtype == torch.int64
    best = scores.amin(1)
    near = scores.gather(1, found.unsqueeze(1)).squeeze(1) - best
    assert bool((near <= 2**-14 * best.abs() + 1e-5).all())
    assert int(found.min()) < int(found.max())


def test_strided_features_and_rows_are_read_right() -> None:
    torch.manual_seed(0)
    rows, offsets, features = torch.randn(16, 64).T, torch.randn(128)[::2], torch.randn(32, 90)
    found = nearest.lowest_scores(features[:16].T, rows, offsets)
    torch.testing.assert_close(found, (offsets + features[:16].T @ rows.T).argmin(1))


@pytest.mark.parametrize(("size", "can"), [(256, True), (8, True), (12, False), (264, False)])
def test_what_scoring_takes(size: int, can: bool) -> None:
    features, rows = torch.empty(3, 4), torch.empty(size, 4)
    assert nearest.can_score(features, rows) is can
    assert not nearest.can_score(features.bfloat16(), rows)
    assert not nearest.can_score(features.to("meta"), rows)
