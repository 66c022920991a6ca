"""Allocation under a budget: the exact optimum, against all choices there are."""

import itertools
import random

import pytest

from pvrt_tune.allocate.knapsack import Option, choose


def brute_force(items: list[list[Option]], budget: int) -> float:
    """Least cost of all choices that fit."""
    return min(
        sum(option.cost for option in choice)
        for choice in itertools.product(*items)
        if sum(option.bits for option in choice) <= budget
    )


def problem(seed: int, count: int, alike: bool) -> list[list[Option]]:
    """Items of up to four options; alike ones share their bits, as layers of a model do."""
    draw = random.Random(seed)
    items = []
    for _ in range(count):
        sizes = [100, 151, 199, 307] if alike else [draw.randint(1, 400) for _ in range(4)]
        costs = [draw.random() * draw.choice([0.01, 1, 10]) for _ in sizes]
        if draw.random() < 0.5:
            costs.sort(reverse=True)
        items.append([Option(*pair) for pair in zip(sizes, costs, strict=True)])
    return items


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_choice_is_the_best_of_all(seed: int, alike: bool) -> None:
    items = problem(seed, 7, alike)
    fewest = sum(min(option.bits for option in options) for options in items)
    most = sum(max(option.bits for option in options) for options in items)
    for share in (0.0, 0.1, 0.35, 0.6, 0.95, 1.0):
        budget = fewest + int(share * (most - fewest))
        chosen = choose(items, budget)
        picked = [options[index] for options, index in zip(items, chosen, strict=True)]
        assert sum(option.bits for option in picked) <= budget
        assert sum(o.cost for o in picked) == pytest.approx(brute_force(items, budget), rel=1e-8)
        assert choose(items, budget) == chosen


def test_a_model_of_many_layers_is_solved_and_fills_its_budget() -> None:
    draw = random.Random(0)
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    items = []
    for _ in range(60):
        for out, inputs in shapes:
            weight = draw.lognormvariate(0, 1.5)
            items.append(
                [
                    Option(int(out * inputs * bits) + 16 * (out + 2048 * books), weight * 4**-bits)
                    for bits, books in ((1, 1), (1.5, 3), (2, 2), (2.5, 5), (3, 3), (4, 4))
                ]
            )
    budget = int(2.3 * sum(60 * out * inputs for out, inputs in shapes))
    chosen = choose(items, budget)
    bits = sum(options[index].bits for options, index in zip(items, chosen, strict=True))
    assert budget - 100_000 < bits <= budget  # less than half a bit of the smallest layer is left


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="fewest"):
        choose([[Option(10, 1.0)], [Option(5, 1.0), Option(4, 2.0)]], 13)


def test_items_that_are_all_alike_are_no_harder() -> None:
    sizes = [100, 150, 200, 300, 401, 402, 600]
    items = [[Option(size, 4.0 ** (-size / 100)) for size in sizes] for _ in range(200)]
    chosen = choose(items, 200 * 230 + 70)
    bits = sum(options[index].bits for options, index in zip(items, chosen, strict=True))
    assert 200 * 230 - 50 < bits <= 200 * 230 + 70
