"""Plans for this machine, or for one described by its memory."""

from dataclasses import replace
from typing import Any

from pvrt.device import default_device, is_here
from pvrt.errors import RunError
from pvrt.tools.held_out import longest_context
from pvrt_tune.allocate.needs import needs, stand_in
from pvrt_tune.data.locate import locate
from pvrt_tune.data.source_model import load_skeleton
from pvrt_tune.machine import Machine
from pvrt_tune.model_blocks import check_divisible, check_readers, find_blocks
from pvrt_tune.model_calls import check_calls
from pvrt_tune.plan import speed
from pvrt_tune.plan.cards import A100, assumed, named
from pvrt_tune.plan.choose import plan_run
from pvrt_tune.plan.memory_plan import Plan, Request
from pvrt_tune.plan.report import describe, misfits
from pvrt_tune.settings import TuneJob
from pvrt_tune.store import choices_of, has_piece


def plan_job(job: TuneJob, machine: Machine, rates: speed.Speed | None = None) -> Plan:
    """The plan of one call of `tune` on this machine, or with the rates of another.

    The model writes its text unless the job names some, or the run in `job.out` has kept what it
    wrote. What the recipe leaves open stays as that run has chosen it.

    Raises SourceError for a model that cannot be read or a scheme that does not divide its layers.
    """
    chosen = {} if job.restart else choices_of(job.out)
    request = Request(
        job.model,
        job.recipe.with_choices(chosen),
        job.device,
        job.data is None and (job.restart or not has_piece(job.out, "calibration")),
        gguf=locate(job.model, weights=False).is_file(),
        activations=job.activations,
        stream=job.stream,
        resumed=bool(chosen),
        calibrated=job.start is not None,
    )
    plan = _plan(request, machine, rates or speed.measure(job.device))
    return plan if job.seconds is None else plan.within(job.seconds)


def plan_here(
    job: TuneJob,
    *,
    host_memory: float | None = None,
    device_memory: float | None = None,
    card: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """(description, why it does not fit) of a run; memory in GB, default what is free here.

    The device of the job may be "auto": what `tune` would take here, or a GPU if its memory or name
    is given. card: one by name, which need not be here. A GPU that nobody names is assumed to be a
    slow one of its memory. Raises RunError for a card of unknown name, and for one beside a CPU.
    """
    if job.device == "cpu" and card is not None:
        raise RunError("--card is for GPUs; leave --device cpu out")
    elsewhere = device_memory is not None or card is not None
    if job.device == "auto":
        job = replace(job, device="cuda" if elsewhere else default_device())
    here = is_here(job.device) and card is None
    machine = Machine.here(job.device if here else "cpu", job.out)
    rates = None
    if job.device != "cpu" and not here:
        known = named(card) if card is not None else assumed(device_memory or A100.memory)
        rates = known.speed("" if card is not None else " (assumed; --card names another)")
        machine = replace(machine, device=int((device_memory or known.memory) * 1e9))
    elif job.device != "cpu" and device_memory is not None:
        machine = replace(machine, device=int(device_memory * 1e9))
    if host_memory is not None:
        machine = replace(machine, host=int(host_memory * 1e9))
    plan = plan_job(job, machine, rates)
    memory = machine.host if machine.device is None else machine.device
    return describe(plan, memory), misfits(plan, machine)


def _plan(request: Request, machine: Machine, rates: speed.Speed) -> Plan:
    model, bits = load_skeleton(request.model), request.recipe.bits
    if bits is not None:
        recipe = replace(request.recipe, scheme=stand_in(bits))
        request = replace(request, recipe=recipe)
    longest, length = longest_context(model.config), request.recipe.length
    if longest is not None and length > longest:
        raise RunError(
            f"windows of {length} tokens are longer than the {longest} that {request.model} was "
            f"made for; give --length {longest}"
        )
    blocks, scheme = find_blocks(model), request.recipe.parsed_scheme
    check_calls(model, blocks)
    check_readers(model, blocks, scheme)
    check_divisible(blocks, scheme)
    plan = plan_run(model, request, rates, machine)
    return plan if bits is None else _shared_out(plan, model, rates)


def _shared_out(plan: Plan, model: Any, rates: speed.Speed) -> Plan:
    """The plan of a recipe with bits: measuring comes first, and the file has these bits.

    The other stages are planned as if all layers had one scheme.
    """
    needed = needs(model, plan.request.recipe, rates.fit_seconds)
    first = next(phase for phase in plan.phases if phase.name == "block pass")
    on_device = plan.request.device != "cpu"
    measuring = replace(
        first,
        name="measuring bits",
        device_bytes=first.device_bytes + needed.more_bytes * on_device,
        host_bytes=first.host_bytes + needed.more_bytes * (not on_device),
        seconds=needed.operations / rates.products + needed.fit_seconds,
    )
    at = plan.phases.index(first)
    result = replace(
        plan.result,
        file_bytes=needed.file_bytes,
        bits_per_weight_linears=needed.bits_layers,
        bits_per_weight_file=needed.bits_file,
    )
    phases = (*plan.phases[:at], measuring, *plan.phases[at:])
    return replace(plan, phases=phases, result=result)
