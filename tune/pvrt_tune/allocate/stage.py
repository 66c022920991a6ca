"""Bits of the whole file shared out: measure, then the best schemes under the budget."""

from collections.abc import Mapping, Sequence
from typing import Any

from pvrt.format.scheme import Scheme
from pvrt_tune.allocate.budget import FileBudget
from pvrt_tune.allocate.errors import expected
from pvrt_tune.allocate.sensitivity import Measured, measure
from pvrt_tune.allocate.units import Unit, find_units
from pvrt_tune.model_blocks import BlockList
from pvrt_tune.run import Run
from pvrt_tune.settings import Recipe
from pvrt_tune.store import Store

_PIECE = "allocation"


def allocate(run: Run) -> dict[str, Scheme]:
    """The scheme of every layer by its name in the model, for a recipe with `bits`.

    Measured once: it is a piece of the run, as are the measurements on the way there. Raises
    RunError when the bits are out of reach for this model.
    """
    saved = stored_schemes(run.store)
    if saved is not None:
        return saved
    bits = run.recipe.bits
    assert bits is not None
    units, budget = problem(run.source.model, run.blocks, run.recipe)
    planned_schemes(units, budget, bits)  # out of reach: said now
    costs = _costs(units, measure(run, units))
    chosen = dict(zip((u.key for u in units), budget.allocate(units, costs, bits), strict=True))
    report = {
        "bits": budget.file_bits(chosen, units) / budget.weights,
        "kl": sum(cost[chosen[unit.key]] for unit, cost in zip(units, costs, strict=True)),
        "schemes": {name: str(chosen[unit.key]) for unit in units for name in unit.names},
    }
    run.store.save(_PIECE, {}, report)
    run.report(_line(units, chosen, report))
    return _parsed(report)


def stored_schemes(store: Store) -> dict[str, Scheme] | None:
    """The schemes that a run has settled; None before it has."""
    report = store.report(_PIECE)
    return None if report is None else _parsed(report)


def planned_schemes(units: Sequence[Unit], budget: FileBudget, bits: float) -> dict[str, Scheme]:
    """Schemes of units by key before anything is measured, in a file of `bits` per weight.

    Every weight counts alike; what is measured moves bits between layers and leaves their sum.
    Raises RunError when the bits are out of reach.
    """
    chosen = budget.allocate(units, [_prior(unit) for unit in units], bits)
    return {unit.key: scheme for unit, scheme in zip(units, chosen, strict=True)}


def problem(model: Any, blocks: BlockList, recipe: Recipe) -> tuple[list[Unit], FileBudget]:
    """The units of a skeleton, and what the file has besides.

    Raises SourceError when no scheme divides a layer.
    """
    units = find_units(model, blocks, recipe)
    return units, FileBudget.of(model, units)


def _prior(unit: Unit) -> dict[Scheme, float]:
    """A quarter of the error for every bit, on every weight alike."""
    return {scheme: unit.weights * 4.0**-scheme.code_bits for scheme in unit.schemes}


def _costs(units: Sequence[Unit], found: Mapping[str, Measured]) -> list[dict[Scheme, float]]:
    """KL that every scheme of every unit is expected to cost: it grows as the error does."""
    errors = expected(units, {key: measured.errors for key, measured in found.items()})
    costs = []
    for unit in units:
        measured = found[unit.key]
        kl = sum(measured.kl) / len(measured.kl)
        share = kl / max(measured.errors[str(unit.reference)], 1e-30)
        costs.append({scheme: share * error for scheme, error in errors[unit.key].items()})
    return costs


def _parsed(report: Mapping[str, Any]) -> dict[str, Scheme]:
    return {name: Scheme.parse(text) for name, text in report["schemes"].items()}


def _line(units: Sequence[Unit], chosen: Mapping[str, Scheme], report: Mapping[str, Any]) -> str:
    counts: dict[str, int] = {}
    for unit in units:
        text = str(chosen[unit.key])
        counts[text] = counts.get(text, 0) + len(unit.names)
    shown = ", ".join(f"{count} of {text}" for text, count in sorted(counts.items()))
    return f"bits shared out by measured KL: {report['bits']:.3f} over the file; layers: {shown}"
