"""The cheapest choice under a budget, exactly: one option for every item.

This is the multiple-choice knapsack problem. A price per bit (the Lagrange multiplier) makes every
item choose alone; the best price gives a lower bound of the cost for the whole and for what is left
after some items. States (bits, cost) of the first items then grow item by item, and those that
another one dominates or whose bound is above the best known choice go (Pisinger, "A minimal
algorithm for the multiple-choice knapsack problem", EJOR 83, 1995). The bound is so close that few
are left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# The same costs summed in another order differ by rounding.
_TOLERANCE = 1e-9
_PRICE_STEPS = 200


class Option(NamedTuple):
    """What an item may take: bits, and what that costs in quality."""

    bits: int
    cost: float


@dataclass(frozen=True)
class _State:
    """Choices for the first items, none dominated: sorted by bits, with falling cost.

    parent and option say how each came from a state of one item less.
    """

    bits: NDArray[np.int64]
    cost: NDArray[np.float64]
    parent: NDArray[np.int64]
    option: NDArray[np.int64]


def choose(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The option of every item, of least summed cost among all choices of at most `budget` bits.

    Of equal costs the choice with fewer bits is taken. Raises ValueError when even the fewest bits
    are above the budget.
    """
    least = sum(min(option.bits for option in options) for options in items)
    if least > budget:
        raise ValueError(f"the fewest bits are {least}, above the budget of {budget}")
    # Items with the widest spread of costs first: their wrong options are ruled out at once.
    order = sorted(range(len(items)), key=lambda i: (-_spread(items[i]), i))
    ordered = [items[i] for i in order]
    price, known = _best_price(ordered, budget)
    relaxed = [min(option.cost + price * option.bits for option in part) for part in ordered]
    left = np.append(np.cumsum(relaxed[::-1])[::-1], 0.0)
    limit = known + _TOLERANCE * abs(known)
    states = [_State(*(np.zeros(1, kind) for kind in (np.int64, float, np.int64, np.int64)))]
    for number, options in enumerate(ordered):
        fewest = sum(min(option.bits for option in part) for part in ordered[number + 1 :])
        states.append(_extended(states[-1], options, budget - fewest))
        bound = states[-1].cost + left[number + 1] - price * (budget - states[-1].bits)
        states[-1] = _kept(states[-1], bound <= limit)
    chosen = [0] * len(items)
    at = len(states[-1].bits) - 1  # of the least cost
    for number in reversed(range(len(items))):
        state = states[number + 1]
        chosen[order[number]] = int(state.option[at])
        at = int(state.parent[at])
    return chosen


def _spread(options: Sequence[Option]) -> float:
    costs = [option.cost for option in options]
    return max(costs) - min(costs)


def _best_price(items: Sequence[Sequence[Option]], budget: int) -> tuple[float, float]:
    """A price per bit near that of the best bound, and the cost of a good choice that fits."""
    low, high = 0.0, 1.0
    for _ in range(_PRICE_STEPS):
        if _bits(_at_price(items, high)) <= budget:
            break
        high *= 2
    for _ in range(_PRICE_STEPS):
        middle = (low + high) / 2
        if _bits(_at_price(items, middle)) <= budget:
            high = middle
        else:
            low = middle
    chosen = _at_price(items, high)
    if _bits(chosen) > budget:  # no price is high enough where more bits cost nothing less
        chosen = [min(options) for options in items]
    return high, sum(option.cost for option in _filled(items, chosen, budget))


def _at_price(items: Sequence[Sequence[Option]], price: float) -> list[Option]:
    """What every item takes when it does what is best for itself."""
    return [min(options, key=lambda o: (o.cost + price * o.bits, o.bits)) for options in items]


def _bits(chosen: Sequence[Option]) -> int:
    return sum(option.bits for option in chosen)


def _filled(items: Sequence[Sequence[Option]], chosen: list[Option], budget: int) -> list[Option]:
    """A choice that fits with what is left spent where it saves most per bit: alike items all
    change at one price, and only some of them may fit.
    """
    left = budget - _bits(chosen)
    while True:
        best, at = 0.0, None
        for index, (options, now) in enumerate(zip(items, chosen, strict=True)):
            for option in options:
                more, saved = option.bits - now.bits, now.cost - option.cost
                if saved > 0 and more <= left and saved / max(more, 1) > best:
                    best, at = saved / max(more, 1), (index, option)
        if at is None:
            return chosen
        index, option = at
        left -= option.bits - chosen[index].bits
        chosen = [*chosen[:index], option, *chosen[index + 1 :]]


def _extended(state: _State, options: Sequence[Option], budget: int) -> _State:
    """Every state with every option of one more item, without what does not fit or is dominated."""
    count = len(state.bits)
    bits = np.concatenate([state.bits + option.bits for option in options])
    cost = np.concatenate([state.cost + option.cost for option in options])
    parent = np.tile(np.arange(count), len(options))
    chosen = np.repeat(np.arange(len(options)), count)
    order = np.lexsort((chosen, cost, bits))
    order = order[bits[order] <= budget]
    best_before = np.minimum.accumulate(np.append(np.inf, cost[order]))[:-1]
    order = order[cost[order] < best_before]
    return _State(bits[order], cost[order], parent[order], chosen[order])


def _kept(state: _State, mask: NDArray[np.bool_]) -> _State:
    return _State(state.bits[mask], state.cost[mask], state.parent[mask], state.option[mask])
