"""Groups that bounds leave out are groups whose nearest value is the one they have."""

import pytest
import torch
from torch import Tensor

from pvrt.format.scheme import GridScheme, Scheme
from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt_tune.fit.grid import GridLinear
from pvrt_tune.pv.representation import AdditiveRepresentation, GridRepresentation
from pvrt_tune.pv.search_bounds import SearchBounds
from tests.fixtures.toy import random_layer


def representation_of(scheme: str, rows: int, width: int) -> AdditiveRepresentation:
    layer = AQLMLinear(width, rows, Scheme.parse(scheme))
    tensors = random_layer(layer.scheme, rows, width, seed=0, dtype=torch.float32)
    with torch.no_grad():
        for name in ("codes", "codebooks", "scales"):
            getattr(layer, name).copy_(getattr(tensors, name))
    return AdditiveRepresentation(layer)


def groups_of(representation: AdditiveRepresentation) -> Tensor:
    return representation.decode().view(-1, representation.group_size)


@pytest.mark.parametrize("stochastic", [False, True])
def test_what_is_left_out_would_not_have_moved_while_codebooks_drift(stochastic: bool) -> None:
    """One codebook, whose search is exact: 30 steps of targets and codewords that drift away."""
    generator = torch.Generator().manual_seed(0)
    representation = representation_of("1x6g8", 24, 64)
    everything = torch.arange(24 * 8)
    target = groups_of(representation).clone()
    left_out = moves = 0
    for _ in range(30):
        if stochastic:
            target = groups_of(representation).clone()
        target += 0.1 * target.std() * torch.randn(target.shape, generator=generator)
        books = representation.codebooks
        books += 0.002 * books.std() * torch.randn(books.shape, generator=generator)
        distance = (target - groups_of(representation)).norm(dim=1)
        draws = torch.rand(len(target), generator=generator) if stochastic else None
        movable = representation.movable(distance, draws)
        best = representation.nearest(target, everything, draws)
        moving = (best.values != groups_of(representation)).any(1)
        assert not bool((moving & ~movable).any())
        left_out += int((~movable).sum())
        moves += int(moving.sum())
        representation.assign(everything, best, movable)
    assert moves > 100  # else the check above checks nothing
    assert left_out > 1000


def test_a_margin_shrinks_with_codebooks_and_grows_by_search_alone() -> None:
    books = torch.zeros(2, 4, 3)
    bounds = SearchBounds(1, 3, books)
    near, far = torch.tensor([[0.4] * 3]), torch.tensor([[0.6] * 3])
    assert bounds.exceeded(near).all()
    groups, known = torch.arange(3), torch.tensor([True, False, True])
    bounds.learn(groups, torch.full((3,), 0.5), same=known, known=known)
    assert bounds.exceeded(near).tolist() == [[False, True, False]]
    assert bounds.exceeded(far).all()
    same = torch.tensor([True, True, False])
    bounds.learn(groups, torch.full((3,), 0.1), same=same, known=known)
    assert bounds.exceeded(near).tolist() == [[False, True, True]]
    moved = books.clone()
    moved[0, 1, 0], moved[1, 3, 2] = 0.05, -0.06
    bounds.follow(moved)
    assert bounds.exceeded(near).all()  # 0.5 less 0.11
    assert not bounds.exceeded(near - 0.03)[0, 0]
    bounds.follow(moved)
    assert not bounds.exceeded(near - 0.03)[0, 0]


@pytest.mark.parametrize("scheme", ["w2g8", "w3g16s"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_weights_of_a_grid_that_are_left_out_would_not_have_moved(
    scheme: str, stochastic: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = GridLinear(64, 24, GridScheme.parse(scheme))
    with torch.no_grad():
        layer.codes.copy_(torch.randint(layer.scheme.levels + 1, (24, 64), generator=generator))
        layer.scales.copy_(torch.rand(layer.scales.shape, generator=generator))
        layer.scales[2] = 0
    representation = GridRepresentation(layer)
    value = representation.decode()
    target = (value + 0.2 * torch.randn(value.shape, generator=generator)).view(-1, 1)
    draws = torch.rand(len(target), generator=generator) if stochastic else None
    movable = representation.movable((target - value.view(-1, 1)).norm(dim=1), draws)
    best = representation.nearest(target, torch.arange(len(target)), draws)
    moving = (best.values != value.view(-1, 1)).any(1)
    assert not bool((moving & ~movable).any())
    assert moving.sum() > 100
    assert 0.1 < movable.float().mean() < 0.8


def test_a_scale_of_zero_moves_nothing() -> None:
    representation = representation_of("2x4g8", 2, 16)
    representation.scales[0] = 0
    assert representation.movable(torch.ones(4)).tolist() == [False, False, True, True]
