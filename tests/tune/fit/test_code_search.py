"""Nearest-entry search against trying every entry."""

import pytest
import torch
from torch import Tensor

from pvrt_tune.fit import code_search
from pvrt_tune.fit.code_search import Cells, halve, lowest, row_minima, squared_distance, weighted
from pvrt_tune.fit.kmeans import Schedule, kmeans


def clustered(count: int, width: int, seed: int) -> Tensor:
    centres = torch.randn(20, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(20, (count,), generator=generator)
    return centres[pick] + 0.5 * torch.randn(count, width, generator=generator)


@pytest.mark.parametrize("count", [1, 5])
def test_a_small_codebook_is_searched_exactly(count: int) -> None:
    entries, queries = clustered(100, 8, 0), clustered(333, 8, 1)
    found = lowest(queries, *squared_distance(entries), count)
    distance = (queries[:, None] - entries).square().sum(2)
    expected = distance.topk(count, largest=False).indices
    assert torch.equal(found.sort(1).values, expected.sort(1).values)


def test_a_weight_per_coordinate_is_respected() -> None:
    entries, queries = clustered(64, 4, 0), clustered(200, 4, 1)
    weights = torch.rand(200, 4, generator=torch.Generator().manual_seed(2))
    found = lowest(torch.cat([weights * queries, weights], 1), *weighted(entries))
    distance = ((queries[:, None] - entries).square() * weights[:, None]).sum(2)
    assert torch.equal(found[:, 0], distance.argmin(1))


def test_halving_makes_equal_cells_of_close_points() -> None:
    points = clustered(4096, 8, 0)
    members = halve(points, 64)
    assert members.shape == (64, 64)
    assert torch.equal(members.flatten().sort().values, torch.arange(4096))
    inside = points[members]
    spread = (inside - inside.mean(1, keepdim=True)).square().mean()
    assert spread < 0.35 * points.var(0).mean()


@pytest.mark.parametrize("size", [4096, 65536])
def test_two_levels_find_almost_always_the_best_entry(size: int) -> None:
    """And what they find instead is hardly worse; with every cell probed they are exact."""
    entries, queries = clustered(size, 8, 0), clustered(500, 8, 1)
    exact = lowest(queries, *squared_distance(entries))[:, 0]
    cells = Cells(halve(entries, 1 << size.bit_length() // 2))
    found = cells.lowest(queries, entries, squared_distance, (8, 1))[:, 0]

    def distance(codes: Tensor) -> float:
        return float((queries - entries[codes]).square().sum())

    assert (found == exact).float().mean() > 0.9
    assert distance(exact) <= distance(found) * (1 + 1e-4) < 1.03 * distance(exact)
    every = cells.lowest(queries, entries, squared_distance, (len(cells.members), 1))[:, 0]
    assert distance(every) == pytest.approx(distance(exact), rel=1e-4)


def test_several_entries_come_from_several_cells_best_included() -> None:
    entries, queries = clustered(4096, 8, 0), clustered(300, 8, 1)
    cells = Cells(halve(entries, 64))
    one = cells.lowest(queries, entries, squared_distance, (8, 1))
    four = cells.lowest(queries, entries, squared_distance, (8, 4))
    assert four.shape == (300, 4)
    assert bool((four == one).any(1).all())
    assert all(len(set(row)) == 4 for row in four.tolist())


@pytest.mark.parametrize("columns", [1, 7, 256, 300])
def test_the_fast_minimum_is_the_plain_one_up_to_near_ties(columns: int) -> None:
    scores = torch.randn(500, columns, generator=torch.Generator().manual_seed(0))
    scores[::7] *= 1e-20
    exact = scores.min(1).values
    values, chosen = row_minima(scores.clone())
    assert chosen.dtype is torch.int64
    picked = scores.gather(1, chosen[:, None])[:, 0]
    assert bool(((picked - exact) <= 2**-14 * exact.abs()).all())
    assert torch.allclose(values, exact, rtol=2**-14, atol=0)


@pytest.mark.parametrize("cells", [1, 16])
def test_kmeans_centres_are_the_means_of_their_points(cells: int) -> None:
    points = clustered(2000, 4, 0)
    weights = torch.rand(2000, 4, generator=torch.Generator().manual_seed(1)) + 0.1
    schedule = Schedule(iterations=60, momentum=0.5, cells=cells, probes=16)
    generator = torch.Generator().manual_seed(0)
    centres, codes = kmeans(points, weights, 256, schedule, generator)
    for code in (0, 100, 255):
        mine = codes == code
        if mine.any():
            mean = (weights[mine] * points[mine]).sum(0) / weights[mine].sum(0)
            assert torch.allclose(mean, centres[code], atol=2e-2)


def test_with_no_more_points_than_centres_every_point_is_one() -> None:
    points = clustered(10, 4, 0)
    schedule = Schedule(iterations=5, momentum=0.8, cells=1, probes=8)
    centres, codes = kmeans(points, torch.ones(10, 4), 16, schedule, torch.Generator())
    assert torch.equal(centres[codes], points)
    assert not centres[10:].any()


@pytest.mark.parametrize("count", [1, 2, 8])
def test_many_rows_on_a_device_have_the_lowest_scores_too(
    count: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_search, "_MANY_ROWS", 10)
    generator = torch.Generator().manual_seed(7)
    features, rows = (torch.randn(n, 4, generator=generator) for n in (50, 300))
    expected = (features @ rows.T).topk(count, largest=False).indices.sort(1).values
    found = lowest(features.to(device), rows.to(device), torch.zeros(300).to(device), count)
    assert torch.equal(found.cpu().sort(1).values, expected)
