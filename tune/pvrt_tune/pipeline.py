"""The order of stages: open the model, calibrate block by block, PV-tune, write checkpoints."""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import pvrt
from pvrt.errors import RunError
from pvrt.format.aqlm import CONFIG_FILE, Checkpoint
from pvrt.format.atomic import write_synced
from pvrt.format.grid import GridCheckpoint, open_checkpoint
from pvrt_tune import parallel
from pvrt_tune.calibrate.stage import walk
from pvrt_tune.config import as_yaml
from pvrt_tune.data import text as calibration_text
from pvrt_tune.data.source_model import Source, load_source
from pvrt_tune.data.text import CalibrationData
from pvrt_tune.machine import Machine, map_large_tensors, release_memory
from pvrt_tune.model_blocks import BlockList, find_blocks
from pvrt_tune.plan.memory_plan import misfits, summary
from pvrt_tune.plan.on_machine import plan_job
from pvrt_tune.progress import Clock, Report
from pvrt_tune.pv.stage import pv_tune, tuned_tensors
from pvrt_tune.run import RUN_FOLDER, RunState, check_output, open_run
from pvrt_tune.settings import TuneJob
from pvrt_tune.write_checkpoint import write


@dataclass(frozen=True)
class _Run:
    """A run whose blocks are calibrated; `reports` are the blocks', on the first rank."""

    job: TuneJob
    source: Source
    blocks: BlockList
    data: CalibrationData
    state: RunState
    reports: list[dict[str, Any]]

    def write(self) -> None:
        """The checkpoint as it stands: the best state of PV-Tuning, or calibration's."""
        tuned = tuned_tensors(self.state)
        write(self.job, self.source, self.blocks, self.data, self.state, self.reports, *tuned)


def tune(job: TuneJob, report: Report = print) -> Checkpoint | GridCheckpoint:
    """Compress a model to a checkpoint in `job.out`; goes on where an earlier call stopped.

    `report` gets progress lines. Raises PvrtError with one sentence for anything that the user can
    mend; KeyboardInterrupt passes through: finished blocks are safe on disk, and once calibration
    is through `job.out` holds the best checkpoint so far. Under torchrun the first process
    calibrates while the others wait; then all tune together.
    """
    deadline = None if job.seconds is None else time.monotonic() + job.seconds
    if not parallel.speaks():
        report = _silent
    with parallel.joined(job.device, report) as group:
        job = replace(job, device=group.device)
        run = group.first(lambda: _calibrate(job, report)) or _follow(job)
        if run.state.finished:
            report(f"{job.out} is already complete; --restart tunes it again")
        else:
            with parallel.held_signals():
                _finish(run, group, report, deadline)
    return open_checkpoint(job.out)


def _silent(line: str) -> None:
    """Progress of all ranks but the first."""


def _calibrate(job: TuneJob, report: Report) -> _Run:
    """Everything up to a checkpoint that can be served."""
    check_output(job.out, resume=job.resume)
    job = _planned(job, report)
    source = load_source(job.model)
    blocks = find_blocks(source.model)
    text = _text(job, source, report)
    fingerprint = _fingerprint(job, source, text)
    versions = {"pvrt": pvrt.__version__, "torch": torch.__version__}
    state = open_run(job.out, fingerprint, versions, report, resume=job.resume, restart=job.restart)
    if state.finished:
        return _Run(job, source, blocks, text or CalibrationData(torch.empty(0), ""), state, [])
    write_synced(state.folder / "config.yaml", as_yaml(job.recipe).encode())
    data = text or _sampled(job, source, state, report)
    release_memory()  # of reading the model and its text
    reports = walk(job, source, blocks, data[job.recipe.calibration], state, report)
    run = _Run(job, source, blocks, data, state, reports)
    # A checkpoint in OUT may be another run's, or its writing may have been cut short.
    served = state.calibrated and (job.out / CONFIG_FILE).exists()
    if job.recipe.pv is not None and not served:
        run.write()
        state.note_calibrated()
        report(f"{job.out} can be served from here on; PV-Tuning makes it better")
    return run


def _follow(job: TuneJob) -> _Run:
    """What the first process has prepared, for the others."""
    source = load_source(job.model)
    state = RunState(job.out / RUN_FOLDER, writes=False)
    data = _text(job, source, _silent)
    if data is None:
        saved = state.load("calibration")
        data = CalibrationData(saved.tensors["tokens"] if saved else torch.empty(0), "")
    return _Run(job, source, find_blocks(source.model), data, state, [])


def _finish(run: _Run, group: parallel.Group, report: Report, deadline: float | None) -> None:
    """PV-Tuning, if the recipe has it, and the final checkpoint."""
    job, state = run.job, run.state
    complete = True
    if job.recipe.pv is not None:
        try:
            complete = pv_tune(job, run.source, run.blocks, run.data, state, report, deadline)
        except KeyboardInterrupt:
            group.first(run.write)
            raise
    group.first(run.write)
    if complete:
        group.first(lambda: state.finish({"blocks": len(run.reports)}))
    else:
        report(f"the time is over: {job.out} holds the best so far, the same command goes on")


def _text(job: TuneJob, source: Source, report: Report) -> CalibrationData | None:
    """Windows of the text that the job names, if it names one."""
    if job.data is None:
        return None
    recipe = job.recipe
    clock = Clock(recipe.windows)

    def progress(done: int, total: int) -> None:
        clock.done = done
        if clock.due():
            report(f"reading {job.data}: window {done}/{total}  {clock.eta()}")

    return calibration_text.from_text(
        job.data, source.tokenizer, recipe.windows, recipe.length, recipe.seed, progress
    )


def _planned(job: TuneJob, report: Report) -> TuneJob:
    """Say what the run will need, before any weight is read, and settle where activations go.

    Raises RunError when it does not fit here.
    """
    map_large_tensors()
    machine = Machine.here(job.device, job.out)
    plan = plan_job(job, machine)
    report(summary(plan))
    problems = misfits(plan, machine)
    if problems and not job.force:
        raise RunError("\n".join((*problems, "--force tries nevertheless")))
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
    data = calibration_text.from_model(model, recipe.windows, recipe.length, recipe.seed, progress)
    del model
    release_memory()
    state.save("calibration", {"tokens": data.tokens}, {"origin": data.origin})
    return data


def _fingerprint(job: TuneJob, source: Source, text: CalibrationData | None) -> dict[str, Any]:
    return {
        "model": source.digest,
        "data": "sampled from the model" if text is None else text.digest,
        "recipe": asdict(job.recipe),
    }
