"""The order of stages: open the model, calibrate block by block, PV-tune, write checkpoints."""

import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

import pvrt
from pvrt.checkpoint import CONFIG_FILE, Checkpoint
from pvrt.errors import RunError
from pvrt.packed import GridCheckpoint, open_checkpoint
from pvrt_tune import calibration
from pvrt_tune.blocks import find_blocks
from pvrt_tune.calibration import CalibrationData
from pvrt_tune.machine import Machine, release_memory
from pvrt_tune.output import write
from pvrt_tune.plan import misfit, summary
from pvrt_tune.planning import plan_job
from pvrt_tune.progress import Clock, Report
from pvrt_tune.pvstage import pv_tune, tuned_tensors
from pvrt_tune.recipe import TuneJob
from pvrt_tune.runstate import RunState, has_piece, open_run
from pvrt_tune.source import Source, load_source
from pvrt_tune.walk import walk


def tune(job: TuneJob, report: Report = print) -> Checkpoint | GridCheckpoint:
    """Compress a model to an AQLM checkpoint in `job.out`; goes on where an earlier call stopped.

    `report` gets progress lines. Raises PvrtError with one sentence for anything that the user can
    mend; KeyboardInterrupt passes through: finished blocks are safe on disk, and once calibration
    is through `job.out` holds the best checkpoint so far.
    """
    deadline = None if job.seconds is None else time.monotonic() + job.seconds
    job = _planned(job, report)
    source = load_source(job.model)
    blocks = find_blocks(source.model)
    text = None
    if job.data is not None:
        size = (job.recipe.windows, job.recipe.length)
        text = calibration.from_text(job.data, source.tokenizer, *size, job.recipe.seed)
    fingerprint = _fingerprint(job, source, text)
    state = open_run(job.out, fingerprint, resume=job.resume, restart=job.restart)
    if state.finished:
        report(f"{job.out} is already complete; --restart tunes it again")
        return open_checkpoint(job.out)
    data = text or _sampled(job, source, state, report)
    calibration_data = replace(data, tokens=data.tokens[job.recipe.calibration])
    reports = walk(job, source, blocks, calibration_data, state, report)
    result = partial(write, job, source, blocks, data, state, reports)
    if job.recipe.pv is not None:
        if not (job.out / CONFIG_FILE).exists():
            result()
            report(f"{job.out} can be served from here on; PV-Tuning makes it better")
        try:
            complete = pv_tune(job, source, blocks, data.tokens, state, report, deadline)
        except KeyboardInterrupt:
            result(*tuned_tensors(state))
            raise
        if not complete:
            result(*tuned_tensors(state))
            report(f"the time is over: {job.out} holds the best so far, the same command goes on")
            return open_checkpoint(job.out)
    result(*tuned_tensors(state))
    state.finish({"blocks": len(blocks.blocks)})
    return open_checkpoint(job.out)


def _planned(job: TuneJob, report: Report) -> TuneJob:
    """Say what the run will need, before any weight is read, and settle where activations go.

    Raises RunError when it does not fit here.
    """
    machine = Machine.here(job.device, job.out)
    text_at_hand = job.data is not None or has_piece(job.out, "calibration")
    plan = plan_job(job, machine, sampled=not text_at_hand)
    report(summary(plan))
    problem = misfit(plan, machine)
    if problem is not None and not job.force:
        raise RunError(f"{problem} (--force tries nevertheless)")
    return replace(job, activations=plan.activations)


def _sampled(job: TuneJob, source: Source, state: RunState, report: Report) -> CalibrationData:
    """The model's own text, kept with the run: resuming must not depend on repeating it."""
    saved = state.load("calibration")
    if saved is not None:
        return CalibrationData(saved.tensors["tokens"], saved.report["origin"])
    recipe = job.recipe
    clock = Clock(recipe.length)

    def progress(done: int, total: int) -> None:
        clock.done, clock.total = done, total
        if done == total or clock.due():
            report(f"sampling calibration text: token {done}/{total}  {clock.eta()}")

    report(f"no --data given: sampling {recipe.windows} x {recipe.length} tokens from the model")
    # Most CPUs only emulate 16-bit products.
    dtype = torch.float32 if job.device == "cpu" else None
    model = source.dense(dtype, job.device)
    data = calibration.from_model(model, recipe.windows, recipe.length, recipe.seed, progress)
    del model
    release_memory()
    state.save("calibration", {"tokens": data.tokens}, {"origin": data.origin})
    return data


def _fingerprint(job: TuneJob, source: Source, text: CalibrationData | None) -> dict[str, Any]:
    return {
        "model": source.digest,
        "data": "sampled from the model" if text is None else text.digest,
        "recipe": asdict(job.recipe),
        "versions": {"pvrt": pvrt.__version__, "torch": torch.__version__},
    }
