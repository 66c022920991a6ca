"""Choices of one process; those over ranks are in test_pv.py."""

import pytest
import torch

from pvrt_tune.parallel import top_share


@pytest.mark.parametrize("count", [1, 37, 999, 1000, 2000])
def test_the_largest_scores_are_found(count: int) -> None:
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(count))
    expected = set(scores.topk(min(count, 1000)).indices.tolist())
    found = top_share(scores, count).tolist()
    assert set(found) == expected and len(found) == len(expected)


def test_scores_that_are_not_positive_are_left_out() -> None:
    scores = torch.tensor([0.0, 3.0, -1.0, 2.0, 0.0, 1.0])
    assert set(top_share(scores, 5).tolist()) == {1, 3, 5}
    assert len(top_share(torch.zeros(8), 3)) == 0
    assert len(top_share(torch.empty(0), 3)) == 0
