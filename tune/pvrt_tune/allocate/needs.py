"""What sharing bits out needs and gives, from a model's skeleton alone: for `pvrt plan`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pvrt_tune.allocate.errors import tried, tried_rows
from pvrt_tune.allocate.stage import planned_schemes, problem
from pvrt_tune.model_blocks import find_blocks
from pvrt_tune.settings import EFFORTS, Recipe


@dataclass(frozen=True)
class Needs:
    """Of the measurement: bytes beyond what calibration's first pass over a block needs, products
    (operations), and seconds of trial fits. Of the file: bytes, bits per weight over all of it, and
    over the layers in codes.
    """

    more_bytes: int
    operations: float
    fit_seconds: float
    file_bytes: int
    bits_file: float
    bits_layers: float


def stand_in(bits: float) -> str:
    """The scheme that stages which only need its size are planned with: of no fewer bits, and with
    groups that divide whatever is shared out.
    """
    return next((text for least, text in ((2, "1x8g4"), (4, "2x8g4")) if bits <= least), "3x8g4")


def needs(model: Any, recipe: Recipe, fit_seconds: Callable[[int, int, Recipe], float]) -> Needs:
    """Needs of a recipe with `bits`; fit_seconds: of a layer [out, in] by a recipe's scheme.

    Raises RunError when the bits are out of reach, SourceError when no scheme divides a layer.
    """
    blocks = find_blocks(model)
    units, budget = problem(model, blocks, recipe)
    assert recipe.bits is not None
    schemes = planned_schemes(units, budget, recipe.bits)
    config, settings = model.config.get_text_config(), recipe.allocation
    own = [sum(p.numel() for p in block.parameters()) for block in blocks.blocks]
    outside = budget.weights - sum(own)
    wide = recipe.samples * recipe.length
    tokens = min(settings.windows, recipe.samples) * min(settings.length, recipe.length)
    passed = sum(sum(own[unit.block or 0 :]) for unit in units)
    head = config.vocab_size * config.hidden_size
    all_tried = tried(units)
    seconds = 0.0
    for unit in units:
        out, inputs = unit.shapes[0]
        rows = min(out, tried_rows(inputs))
        for scheme in unit.schemes if unit.key in all_tried else [unit.reference]:
            quick = replace(EFFORTS["quick"], scheme=str(scheme))
            seconds += fit_seconds(rows, inputs, quick)
    bits = sum(unit.bits(schemes[unit.key], budget.float_bits) for unit in units)
    size = budget.file_bits(schemes, units)
    # Embedding and head in float32; of one of them, with columns of one size, noise and what it is
    # scaled by; streams; chances.
    more = 4 * (outside + 5 * head + 4 * config.vocab_size * settings.length)
    more += 4 * wide * config.hidden_size
    return Needs(
        more_bytes=more,
        operations=2.0 * (tokens * (passed + head * len(units)) + wide * sum(own)),
        fit_seconds=seconds,
        file_bytes=size // 8,
        bits_file=size / budget.weights,
        bits_layers=bits / sum(unit.weights for unit in units),
    )
