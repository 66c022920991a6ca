"""Relative errors tr(E H E^T) / tr(W H W^T) that schemes leave in a unit, from fits of few rows.

Every unit is fitted in one scheme, its reference. Two units of a kind (all q projections, say) are
fitted in all schemes: how much better or worse than the reference a scheme is hardly depends on the
block.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import exp, log

import torch
from torch import Tensor

from pvrt.format.scheme import Scheme
from pvrt_tune.allocate.noise import coarsest
from pvrt_tune.allocate.units import Unit
from pvrt_tune.fit.additive import fit_layer
from pvrt_tune.settings import EFFORTS, Recipe

# Weights that a scheme is tried on, in whole rows: 64 groups of 16 for every codeword of 8 bits.
# Codebooks that describe fewer fit them better than they would a whole layer.
_TRIED_WEIGHTS = 64 * 16 * 256
# Fits to the last bit leave errors that cannot be told from none.
_LEAST = 1e-9


def fitted(
    weight: Tensor,
    moment: Tensor,
    schemes: Iterable[Scheme],
    recipe: Recipe,
    generator: torch.Generator,
) -> dict[Scheme, float]:
    """Errors of a weight [out, in] by scheme, given H [in, in].

    Some rows are fitted, and their errors carried over to all of them by what rounding would leave:
    rows differ widely in how much of their outputs a rounding error is (`coarsest`). Fits are quick
    whatever the recipe's effort: that changes all schemes alike.
    """
    rows = torch.randperm(len(weight), generator=generator)[: tried_rows(weight.shape[1])]
    some = weight[rows.to(weight.device)].float()
    damping = recipe.fit.damping
    settings = replace(EFFORTS["quick"].fit, damping=damping)
    carried = coarsest(weight, moment, damping) / coarsest(some, moment, damping)
    return {
        scheme: carried * fit_layer(some, moment, scheme, settings, generator).relative_error()
        for scheme in schemes
    }


def tried_rows(in_features: int) -> int:
    """Rows that a scheme is tried on, of a layer that has so many."""
    return -(-_TRIED_WEIGHTS // in_features)


def tried(units: Sequence[Unit]) -> set[str]:
    """Keys of the units that are fitted in all schemes: two of every kind, if it has two."""
    kinds: dict[str, list[str]] = {}
    for unit in units:
        kinds.setdefault(kind(unit), []).append(unit.key)
    return {keys[len(keys) * part // 4] for keys in kinds.values() for part in (1, 3)}


def kind(unit: Unit) -> str:
    """What a unit's fellows in other blocks share with it: its name without numbers, its shape."""
    out, inputs = unit.shapes[0]
    return re.sub(r"\.\d+(?=\.|$)", "", unit.key) + f" {out} x {inputs}"


def expected(
    units: Sequence[Unit], errors: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[Scheme, float]]:
    """The error of every scheme of every unit by its key.

    errors: what was fitted, by key and scheme as text: the reference of each, all of those tried.
    """
    factors: dict[tuple[str, Scheme], list[float]] = {}
    for unit in units:
        own = errors[unit.key]
        base = max(own[str(unit.reference)], _LEAST)
        for scheme in unit.schemes:
            if str(scheme) in own:
                factor = log(max(own[str(scheme)], _LEAST) / base)
                factors.setdefault((kind(unit), scheme), []).append(factor)
    return {
        unit.key: {
            scheme: errors[unit.key][str(unit.reference)] * _mean(factors[kind(unit), scheme])
            for scheme in unit.schemes
        }
        for unit in units
    }


def _mean(logarithms: Sequence[float]) -> float:
    return exp(sum(logarithms) / len(logarithms))
