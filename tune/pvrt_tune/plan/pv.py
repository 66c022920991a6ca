"""What PV-Tuning needs: the arithmetic of docs/tuning.md, for `pvrt plan`."""

from dataclasses import dataclass

from pvrt_tune.pv.loss import CHUNK_BYTES, TEACHER_CHUNK
from pvrt_tune.pv.optimizer import STRATEGIES
from pvrt_tune.settings import Recipe


@dataclass(frozen=True)
class Sizes:
    """Of a model: quantised weights, their groups that codebooks describe (0 for grids), all
    parameters, those outside the blocks, vocabulary and width, the largest layer's weights, bytes
    of all quantised tensors on disk, and what one token leaves for the backward pass of all blocks
    (in numbers, summed over blocks) and of the largest block alone.
    """

    quantised: int
    groups: int
    parameters: int
    outside: int
    vocabulary: int
    width: int
    largest: int
    stored: int
    blocks: int
    kept: float
    kept_by_one: float


@dataclass(frozen=True)
class Needs:
    """Bytes of the student at work, of the original model, of that model's states in host memory
    and of the run folder; and operations.
    """

    student: float
    original: float
    states: float
    disk: float
    operations: float


def needs(sizes: Sizes, recipe: Recipe, item: int, original_item: int) -> Needs:
    """PV-Tuning of a student that computes in `item` bytes per number, by a recipe with training;
    the original model's numbers have `original_item`.
    """
    settings, pv, length = recipe.training, recipe.pv, recipe.length
    assert settings is not None
    strategy = STRATEGIES[pv.strategy]
    latent = (2 if pv.low_memory else 4) * strategy.accumulates
    moment = (0 if pv.low_memory else 4) * strategy.moves_codes
    per_weight = 2 * item + latent + moment  # the weight, its gradient, and B with its moment
    bounds = 2 * sizes.groups * strategy.moves_codes
    trained = 0 if settings.freeze_embeddings else 3 * 4 * sizes.outside
    # One layer at a time: gradient, decoded weight, direction, root of the moment, distances.
    layer = 4 * 6 * sizes.largest
    tokens = settings.microbatch * length
    kept = sizes.kept
    if settings.recompute_activations:
        kept = sizes.blocks * sizes.width + sizes.kept_by_one
    work = max(layer, item * tokens * kept + 4 * CHUNK_BYTES)
    kept_too = sizes.stored + bounds + trained
    student = per_weight * sizes.quantised + item * sizes.outside + kept_too + work
    original = original_item * sizes.parameters
    seen = settings.steps * settings.batch
    windows = recipe.windows
    if not settings.teacher_first:
        windows = min(windows, seen + settings.held_out)
    states = 2 * windows * length * sizes.width
    # One chunk is being computed, part by part; the others are mapped from their files.
    states_at_hand = 2 * 2 * min(TEACHER_CHUNK, windows) * length * sizes.width
    state = (latent + moment) * sizes.quantised + kept_too
    looks = settings.steps // settings.evaluate_every + 1
    head = sizes.vocabulary * sizes.width
    passes = 4 if settings.recompute_activations else 3
    operations = (
        2.0
        * length
        * (
            windows * (sizes.parameters - sizes.outside)
            + seen * (passes * (sizes.parameters - sizes.outside) + 3 * head)
            + looks * settings.held_out * (sizes.parameters - sizes.outside + 2 * head)
        )
    )
    # The newest state and best student are complete before older ones go.
    disk = 2 * (state + sizes.stored) + states
    return Needs(student, original, states_at_hand, disk, operations)
