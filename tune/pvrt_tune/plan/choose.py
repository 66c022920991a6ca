"""What a recipe leaves open is chosen so that the run fits the machine.

Of all ways that fit, the one that takes least time is chosen. Two things change the result by more
than the order of sums. Latent weights in bfloat16 are taken where all other ways that fit take more
than twice as long. Codes stay in block tuning where a block's latent weights do not fit. What the
recipe says stays.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from pvrt_tune import parallel
from pvrt_tune.machine import Machine
from pvrt_tune.plan.memory_plan import Phase, Plan, Planner, Request
from pvrt_tune.plan.report import duration, gigabytes
from pvrt_tune.plan.speed import Speed
from pvrt_tune.settings import Recipe

#: Snapshots of less are taken anyway; of more, only where a kill would cost more than an hour, and
#: where they leave enough of the free disk.
_SMALL_BYTES, _LONG_SECONDS, _SHARE_OF_DISK = 10e9, 3600, 0.5
#: What a way should take of a device, if there is such a way: allocators leave holes.
_FULL = 0.95
#: How much longer may be waited for the result that does not differ.
_PRICE = 2
_CODES_STAY = "codes stay in block tuning, for whose latent weights there is no room"


@dataclass(frozen=True)
class Way:
    """One way to PV-tune: a settled recipe, whether the original model is streamed, and the phase
    that it makes.
    """

    recipe: Recipe
    stream: bool
    phase: Phase


def plan_run(model: Any, request: Request, speed: Speed, machine: Machine) -> Plan:
    """Plan a run over a skeleton, with what is left open chosen for a machine.

    Where nothing fits, it is the plan that lacks least. Raises SourceError when the model has no
    blocks.
    """
    asked = request.recipe.finetune.move_codes
    planner = _planner(model, request, speed, machine)
    request = planner.request
    activations = _activations(planner, machine)
    streams = [request.stream, *[True] * (planner.cuda and not request.stream)]
    sampled = [planner.sampling(stream=stream) for stream in streams if request.sampled]
    if sampled and not _fits(sampled[0], machine):
        streams = streams[-1:]
    recipe, stream, tuning = request.recipe, streams[0], []
    chosen = [_CODES_STAY] * (recipe.finetune.move_codes is False is not asked)
    hindrances: tuple[str, ...] = ()
    if recipe.training is not None:
        way, usual = _way(planner, streams, machine)
        recipe, stream, tuning = way.recipe, way.stream, [way.phase]
        chosen += _chosen(planner, way, usual, machine)
        hindrances = () if _fits(way.phase, machine) else _hindrances(planner, streams, machine)
    elif stream and not request.stream:
        chosen.append(_streamed(planner))
    first = [planner.sampling(stream=stream)] if request.sampled else []
    return planner.plan(
        [*first, *planner.block_phases(activations), *tuning, planner.write()],
        request=replace(request, recipe=recipe),
        activations=activations,
        stream=stream,
        chosen=f"chosen: {'; '.join(chosen)}" if chosen else None,
        hindrances=hindrances,
    )


def _planner(model: Any, request: Request, speed: Speed, machine: Machine) -> Planner:
    """A planner whose recipe says whether block tuning moves codes: it does, unless calibration
    fits only without.
    """
    planners = []
    for codes in (True, False):
        recipe = request.recipe.with_choices({"move_codes": codes})
        planners.append(Planner(model, replace(request, recipe=recipe), speed, machine.host))
        if all(_fits(phase, machine) for phase in planners[-1].block_phases("disk")):
            return planners[-1]
    return planners[0]


def _activations(planner: Planner, machine: Machine) -> Literal["memory", "disk"]:
    """Where hidden states go: into memory if they fit."""
    asked = planner.request.activations
    if asked != "auto":
        return asked
    inside = all(phase.host_bytes <= machine.host for phase in planner.block_phases("memory"))
    return "memory" if inside else "disk"


def _way(planner: Planner, streams: list[bool], machine: Machine) -> tuple[Way, Way]:
    """The way to PV-tune, and the one that would be taken if there were no limits."""
    ways = sorted(_ways(planner, streams, _said(planner.recipe)), key=_cost)
    usual = ways[0]
    free = machine.device
    roomy = machine if free is None else replace(machine, device=int(_FULL * free))
    fitting = (way for way in ways if _fits(way.phase, roomy))
    way = next(fitting, None) or min(ways, key=lambda way: _lack(way.phase, machine))
    return _with_snapshots(planner, way, machine), usual


def _said(recipe: Recipe) -> dict[str, Any]:
    """The choices of PV-Tuning that a recipe does not leave open, by name."""
    named = {n: value for n, value in recipe.choices.items() if value is not None}
    return {name: value for name, value in named.items() if name != "move_codes"}


def _hindrances(planner: Planner, streams: list[bool], machine: Machine) -> tuple[str, ...]:
    """What the recipe says of its choices, by name, if there were a way that fits without it."""
    ways = _ways(planner, streams, {})
    return tuple(_said(planner.recipe)) if any(_fits(w.phase, machine) for w in ways) else ()


def _ways(planner: Planner, streams: list[bool], said: Mapping[str, Any]) -> Iterator[Way]:
    """All ways that are left open by what is said, without snapshots unless that asks for them."""
    training, pv = planner.recipe.training, planner.recipe.pv
    assert training is not None
    most = min(4, training.batch)
    alone = planner.cuda and parallel.world() == 1
    open_: dict[str, list[Any]] = {
        "microbatch": [most >> halved for halved in range(most.bit_length())],
        "recompute_activations": [False, True],
        "teacher_first": [False, True],
        "states": ["device", "host"] if alone else ["device"],
        "low_memory": [False, True],
        "snapshots": [False],
    }
    open_.update({name: [value] for name, value in said.items()})
    for *values, stream in product(*open_.values(), streams):
        chosen = dict(zip(open_, values, strict=True))
        recipe = replace(
            planner.recipe,
            pv=replace(pv, low_memory=chosen.pop("low_memory")),
            training=replace(training, **chosen),
        )
        yield Way(recipe, stream, planner.pv(recipe, stream=stream))


def _cost(way: Way) -> float:
    """What makes a way worse than another: its time, and twice that where the result differs."""
    return way.phase.seconds * (_PRICE if way.recipe.pv.low_memory else 1)


def _with_snapshots(planner: Planner, way: Way, machine: Machine) -> Way:
    """The way with snapshots, if they are worth their disk and it has room."""
    assert planner.recipe.training is not None and way.recipe.training is not None
    if planner.recipe.training.snapshots is not None:
        return way
    recipe = replace(way.recipe, training=replace(way.recipe.training, snapshots=True))
    phase = planner.pv(recipe, stream=way.stream)
    small = phase.disk_bytes - way.phase.disk_bytes <= _SMALL_BYTES
    worth = small or (
        way.phase.seconds > _LONG_SECONDS and phase.disk_bytes <= _SHARE_OF_DISK * machine.disk
    )
    return Way(recipe, way.stream, phase) if worth and phase.disk_bytes <= machine.disk else way


def _lack(phase: Phase, machine: Machine) -> float:
    """The largest share of what is free that a phase needs."""
    needs = (
        (phase.device_bytes, machine.device),
        (phase.host_bytes, machine.host),
        (phase.disk_bytes, machine.disk),
    )
    return max(needed / max(free, 1) for needed, free in needs if free is not None)


def _fits(phase: Phase, machine: Machine) -> bool:
    return _lack(phase, machine) <= 1


def _streamed(planner: Planner) -> str:
    size = gigabytes(planner.shape.itemsize * planner.shape.parameters)
    return f"the original model of {size} comes from the host block by block"


def _chosen(planner: Planner, way: Way, usual: Way, machine: Machine) -> list[str]:
    """What was chosen of PV-Tuning, why and what it costs; nothing if all is as usual."""
    training, asked = way.recipe.training, planner.recipe
    assert training is not None
    words = {
        "teacher_first": "the original model's states first",
        "recompute_activations": "activations computed twice",
        "microbatch": f"{training.microbatch} windows at once",
        "states": "latent weights, moments and gradients in host memory",
        "low_memory": "latent weights in bfloat16, moments factored (the result differs a little)",
    }
    before, after = usual.recipe.choices, way.recipe.choices
    found = [
        text
        for name, text in words.items()
        if asked.choices[name] is None and before[name] != after[name]
    ]
    parts = [_streamed(planner)] * (way.stream and not planner.request.stream)
    if found:
        need, free = usual.phase.device_bytes, machine.device
        if free is None:
            need, free = usual.phase.host_bytes, machine.host
        parts.append(
            f"{', '.join(found)} (otherwise PV-Tuning needs {gigabytes(need)} of the "
            f"{gigabytes(free)} that are free), which takes {duration(way.phase.seconds)} instead "
            f"of {duration(usual.phase.seconds)}"
        )
    if not training.snapshots and asked.choices["snapshots"] is None:
        size = 2 * planner.snapshot_bytes(way.recipe)
        parts.append(
            f"no snapshots, which would take {gigabytes(size)} of disk, so that PV-Tuning begins "
            "anew after a kill"
        )
    return parts
