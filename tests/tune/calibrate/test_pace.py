"""What blocks leave out so that they are through in time."""

import pytest

from pvrt_tune.calibrate.pace import LEAST, Pace
from pvrt_tune.settings import EFFORTS


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still."""
    clock = [0.0]
    monkeypatch.setattr("pvrt_tune.calibrate.pace.time.monotonic", lambda: clock[0])
    return clock


def test_without_a_limit_nothing_changes(now: list[float]) -> None:
    pace = Pace(None, 30)
    assert not pace.after(1e9, 5)
    assert pace == Pace(None, 30)
    assert pace.recipe(EFFORTS["best"]) == EFFORTS["best"]


def test_fits_are_cut_first_and_then_text(now: list[float]) -> None:
    pace = Pace(100.0, 64)
    assert not pace.after(10.0, 10)  # ten blocks of ten seconds
    assert pace.after(10.1, 10)
    assert pace == Pace(100.0, 64, brief=True)
    assert pace.after(20.0, 10)
    assert pace.batches == 32
    assert not pace.after(9.0, 10)
    now[0] = 200.0  # too late
    assert pace.after(1.0, 10)
    assert pace.batches == LEAST
    assert not pace.after(1.0, 10)


def test_few_batches_stay_as_they_are(now: list[float]) -> None:
    pace = Pace(0.0, 2, brief=True)
    assert not pace.after(1.0, 3)
    assert pace.batches == 2


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_brief_recipe_is_no_longer_than_quick(effort: str) -> None:
    own, quick = EFFORTS[effort], EFFORTS["quick"]
    brief = Pace(0.0, 8, brief=True).recipe(own)
    assert brief.fit.rounds == quick.fit.rounds
    assert brief.fit.kmeans_iterations == quick.fit.kmeans_iterations
    assert brief.finetune.epochs == 1
    assert (brief.scheme, brief.samples, brief.training) == (own.scheme, own.samples, own.training)
