"""Plans for this machine, or for one described by its memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pvrt.device import default_device, is_here
from pvrt_tune.data.source_model import load_skeleton, locate
from pvrt_tune.machine import Machine
from pvrt_tune.model_blocks import check_divisible, find_blocks
from pvrt_tune.plan import speed
from pvrt_tune.plan.memory_plan import Plan, Request, plan_run
from pvrt_tune.plan.report import describe, misfit
from pvrt_tune.settings import TuneJob


def plan_job(job: TuneJob, machine: Machine, *, sampled: bool) -> Plan:
    """The plan of one call of `tune` on this machine.

    Raises SourceError for a model that cannot be read or a scheme that does not divide its layers.
    """
    request = Request(
        job.model,
        job.recipe,
        job.device,
        sampled,
        gguf=locate(job.model, weights=False).is_file(),
        activations=job.activations,
    )
    return _plan(request, machine)


def plan_here(
    job: TuneJob,
    *,
    sampled: bool,
    host_memory: float | None = None,
    device_memory: float | None = None,
) -> tuple[dict[str, Any], str | None]:
    """(description, why it does not fit) of a run; memory in GB, default what is free here.

    The job's device may be "auto" and need not be here; where it writes does not matter.
    """
    device = job.device
    if device == "auto":
        device = "cuda" if device_memory is not None else default_device()
    machine = Machine.here(device if is_here(device) else "cpu", Path())
    if host_memory is not None:
        machine = replace(machine, host=int(host_memory * 1e9))
    if device_memory is not None and device != "cpu":
        machine = replace(machine, device=int(device_memory * 1e9))
    plan = plan_job(replace(job, device=device), machine, sampled=sampled)
    memory = machine.host if machine.device is None else machine.device
    return describe(plan, memory), misfit(plan, machine)


def _plan(request: Request, machine: Machine) -> Plan:
    model = load_skeleton(request.model)
    check_divisible(find_blocks(model), request.recipe.parsed_scheme)
    here = is_here(request.device)
    rates = speed.measure(request.device) if here else speed.GPU_OF_A100_CLASS
    return plan_run(model, request, rates, machine)
