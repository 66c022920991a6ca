"""Errors that schemes are expected to leave, from a few that were fitted."""

import pytest
import torch

from pvrt.format.scheme import Scheme
from pvrt_tune.allocate.errors import expected, fitted, kind, tried
from pvrt_tune.allocate.units import Unit
from pvrt_tune.randomness import seeded
from pvrt_tune.settings import Recipe

SCHEMES = tuple(Scheme.parse(text) for text in ("1x8g8", "2x8g8", "2x8g4"))


def unit(name: str) -> Unit:
    return Unit((name,), ((128, 64),), 0, SCHEMES)


def units() -> list[Unit]:
    return [unit(f"model.layers.{i}.{part}") for i in range(8) for part in ("q_proj", "up.3.w1")]


def test_two_of_every_kind_are_tried() -> None:
    assert kind(units()[1]) == "model.layers.up.w1 128 x 64"
    keys = tried(units())
    assert len(keys) == 4
    assert {key.split(".")[2] for key in keys} == {"2", "6"}
    assert tried([unit("lm_head")]) == {"lm_head"}


def test_an_untried_unit_scales_its_own_reference() -> None:
    all_units = units()
    errors = {u.key: {"2x8g8": 0.1} for u in all_units}
    for key, factor in zip(sorted(tried(all_units)), (4.0, 1.0, 9.0, 1.0), strict=True):
        errors[key] = {"1x8g8": 0.1 * factor, "2x8g8": 0.1, "2x8g4": 0.01}
    errors["model.layers.0.q_proj"]["2x8g8"] = 0.2
    found = expected(all_units, errors)
    one, two, four = SCHEMES
    assert found["model.layers.0.q_proj"][two] == pytest.approx(0.2)
    assert found["model.layers.0.q_proj"][four] == pytest.approx(0.02)
    # Of factors 4 and 9 for one kind, the geometric mean.
    assert found["model.layers.0.q_proj"][one] == pytest.approx(0.2 * 6)


def test_fits_of_some_rows_say_what_all_rows_would_leave() -> None:
    draw = torch.Generator().manual_seed(5)
    sizes = torch.logspace(-1, 1, 16384).unsqueeze(1)  # rows of very different sizes
    weight = torch.randn(16384, 32, generator=draw) * sizes
    scheme = Scheme.parse("1x8g4")
    found = fitted(weight, torch.eye(32), [scheme], Recipe(), seeded(0, "rows"))
    # The best code of 2 bits for Gaussian weights leaves 1/16; four together at best leave 0.09.
    assert 0.0625 < found[scheme] < 0.14
