"""The order of stages: open the model, calibrate block by block, PV-tune, write checkpoints."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from pvrt.errors import RunError
from pvrt.format.aqlm import Checkpoint
from pvrt.format.config_block import CONFIG_FILE
from pvrt.format.grid import GridCheckpoint, open_checkpoint
from pvrt.format.scheme import GridScheme, Scheme
from pvrt.progress import PLAN, WARNING, Event
from pvrt.tools.perplexity import check_known
from pvrt.version import __version__
from pvrt_tune import parallel
from pvrt_tune.allocate.stage import allocate
from pvrt_tune.calibrate.adopt import Start, adopt, schemes_of, start_digest
from pvrt_tune.calibrate.stage import calibrate
from pvrt_tune.data import sampled
from pvrt_tune.data import text as calibration_text
from pvrt_tune.data.documents import check_named
from pvrt_tune.data.source_model import Source, load_source
from pvrt_tune.data.text import CalibrationData, Windows
from pvrt_tune.distil.stage import pv_tune, tuned_tensors
from pvrt_tune.machine import Machine, host_dtype, map_large_tensors, release_memory
from pvrt_tune.model_blocks import find_blocks
from pvrt_tune.model_card import discard
from pvrt_tune.original import original
from pvrt_tune.plan.on_machine import plan_job
from pvrt_tune.plan.report import larger, misfits, stages, summary
from pvrt_tune.progress import Clock, Report
from pvrt_tune.run import Run
from pvrt_tune.settings import Recipe, TuneJob
from pvrt_tune.settings.files import as_yaml
from pvrt_tune.store import RUN_FOLDER, Store, check_output, open_store, unseen
from pvrt_tune.time_limit import CALIBRATED, SAMPLED, Cuts, TimeLimit, part
from pvrt_tune.write_checkpoint import note_greedy, write

#: Windows that calibrate at least, however short the time is.
_LEAST = 8

#: What the first process tells the others: text, job, and schemes of layers (see `Run`).
Known = tuple[CalibrationData, TuneJob, Mapping[str, Scheme | GridScheme]]


def tune(job: TuneJob, report: Report = print) -> Checkpoint | GridCheckpoint:
    """Compress a model to a checkpoint in `job.out`; goes on where an earlier call stopped.

    `report` gets progress lines. Raises PvrtError with one sentence for anything that the user can
    fix; KeyboardInterrupt passes through: finished blocks are safe on disk, and once calibration
    is through `job.out` holds the best checkpoint so far. Under torchrun the first process
    calibrates while the others wait; then all tune together.
    """
    map_large_tensors()
    limit = TimeLimit(job.seconds)
    if not parallel.speaks():
        report = _silent
    with parallel.joined(job.device, report) as group:
        job = replace(job, device=group.device)
        run = group.first(lambda: _calibrated(job, report, limit))
        # Read and chosen once: what another rank reads at the same name may be another text.
        mine = None if run is None else (run.data, run.settings, run.schemes)
        known: Known | None = parallel.agreed(mine)
        if run is None:
            run = _follow(group.device, known)
        if run.store.finished:
            report(f"{job.out} is already complete; --restart tunes it again")
        else:
            with parallel.held_signals():
                _finish(run, group, limit.until())
    return open_checkpoint(job.out)


def _silent(line: str) -> None:
    """Progress of all ranks but the first."""


def _calibrated(job: TuneJob, report: Report, limit: TimeLimit) -> Run:
    """The run, up to a checkpoint that can be served."""
    check_output(job.out, resume=job.resume)
    if job.data is not None:
        check_named(job.data)
    job, cuts = _planned(job, report)
    source = load_source(job.model)
    for note in source.notes:
        report(note)
    blocks = find_blocks(source.model)
    text = _text(job, source, report)
    versions = {"pvrt": __version__, "torch": torch.__version__}
    start = None if job.start is None else open_checkpoint(job.start)
    store = open_store(job, _fingerprint(job, source, text, start), versions, report)
    run = Run(job, source, blocks, text or CalibrationData(torch.empty(0), ""), store, report)
    if store.finished:
        return run
    store.put("config.yaml", as_yaml(job.recipe).encode())
    if text is None:
        run = replace(run, data=_sampled(run, limit, cuts.text))
    release_memory()  # of reading the model and its text
    if start is not None:
        run = replace(run, schemes=schemes_of(start, source, blocks))
        adopt(run, start)
    else:
        if job.recipe.bits is not None:
            run = replace(run, schemes=allocate(_measured_in_time(run, cuts)))
            release_memory()
        calibrate(run, limit.until(CALIBRATED), brief=cuts.work < 1)
    # A checkpoint in OUT may be another run's, or its writing may have been cut short.
    served = store.calibrated and (job.out / CONFIG_FILE).exists()
    if job.recipe.training is not None and not served:
        _write(run)
        store.note_calibrated()
        report(f"{job.out} can be served from here on; PV-Tuning makes it better")
    return run


def _follow(device: str, known: Known | None) -> Run:
    """The run that the first process has prepared, for the others, from what it knows.

    Raises RunError when the output folder is not the first process's.
    """
    if known is None:
        raise unseen()
    data, job, schemes = known
    job = replace(job, device=device)
    source = load_source(job.model)
    store = Store(job.out / RUN_FOLDER, writes=False)
    if not store.events:
        raise unseen()
    return Run(job, source, find_blocks(source.model), data, store, _silent, schemes)


def _finish(run: Run, group: parallel.Group, deadline: float | None) -> None:
    """PV-Tuning, if the recipe has it, and the final checkpoint."""
    complete = True
    if run.recipe.training is not None:
        try:
            complete = pv_tune(run, deadline)
        except KeyboardInterrupt:
            group.first(lambda: _write(run))
            raise
    group.first(lambda: _write(run))
    group.first(lambda: note_greedy(run))
    if complete:
        group.first(lambda: run.store.finish({"blocks": len(run.blocks.blocks)}))
    else:
        training = run.recipe.training
        again = "goes on" if training and training.snapshots else "begins PV-Tuning anew"
        out = run.settings.out
        run.report(f"the time is over: {out} holds the best so far, the same command {again}")


def _write(run: Run) -> None:
    """The checkpoint as it stands: the best state of PV-Tuning, or calibration's."""
    discard(run.settings.out)
    write(run, *tuned_tensors(run.store))


def _text(job: TuneJob, source: Source, report: Report) -> CalibrationData | None:
    """Windows of the text that the job names, if it names one."""
    if job.data is None:
        return None
    recipe = job.recipe
    clock = Clock(recipe.windows)

    def progress(done: int, total: int) -> None:
        clock.done = done
        if clock.due():
            report(clock.event("reading", f"reading {job.data}: window {done}/{total}"))

    windows = _windows(recipe)
    data = calibration_text.from_text(job.data, source.tokenizer, windows, progress, report)
    check_known(data.tokens, source.model.config)
    return data


def _windows(recipe: Recipe) -> Windows:
    """Of all text that a recipe asks for."""
    return Windows(recipe.windows, recipe.length, recipe.seed)


def _measured_in_time(run: Run, cuts: Cuts) -> Run:
    """The run with as many windows to measure bits on as there is time for."""
    job, settings = run.settings, run.recipe.allocation
    fewer = replace(settings, windows=part(settings.windows, cuts.work, 1))
    return replace(run, settings=replace(job, recipe=replace(job.recipe, allocation=fewer)))


def _planned(job: TuneJob, report: Report) -> tuple[TuneJob, Cuts]:
    """Say what the run will need, before any weight is read, and settle what is left open.

    Raises RunError when it does not fit here.
    """
    machine = Machine.here(job.device, job.out)
    plan = plan_job(job, machine)
    report(Event(summary(plan), PLAN, stages=stages(plan), limit=job.seconds))
    if plan.chosen is not None:
        report(plan.chosen)
    more = larger(plan)
    if more is not None:
        report(Event(more, WARNING))
    if plan.cuts.work < 1:
        work = f"{plan.cuts.work:.0%}"
        report(f"stages before PV-Tuning have time for {work} of their work: they cut it")
    problems = misfits(plan, machine)
    if problems and not job.force:
        raise RunError("\n".join((*problems, "--force tries nevertheless")))
    recipe = job.recipe.with_choices(plan.request.recipe.choices)
    job = replace(job, recipe=recipe, activations=plan.activations, stream=plan.stream)
    return job, plan.cuts


def _sampled(run: Run, limit: TimeLimit, share: float) -> CalibrationData:
    """The model's own text, kept with the run: resuming must not depend on repeating it.

    share: of the recipe's windows that there is time for; some there are for every stage.
    """
    saved = run.store.load("calibration")
    if saved is not None:
        return CalibrationData(saved.tensors["tokens"], saved.report["origin"])
    recipe, source = run.recipe, run.source
    clock, least = Clock(recipe.length), recipe.calibration.start + _LEAST
    wanted = replace(_windows(recipe), count=part(recipe.windows, share, least))

    def progress(done: int, total: int) -> None:
        clock.done, clock.total = done, total
        if done == total or clock.due():
            line = f"sampling calibration text: token {done}/{total}"
            run.report(clock.event("sampling", line))

    def enough(done: int) -> bool:
        return done >= least and limit.over(SAMPLED)

    windows = f"{wanted.count} x {recipe.length} tokens"
    run.report(f"no --data given: sampling {windows} from the model")
    dtype = host_dtype(source.model.dtype.itemsize) if run.device == "cpu" else None
    model = original(source, dtype, run.settings)
    data = sampled.from_model(model, wanted, progress, enough if limit.seconds else None)
    if len(data) < recipe.windows:
        run.report(f"the time is short: {len(data)} of {recipe.windows} windows have to do")
    del model
    release_memory()
    run.store.save("calibration", {"tokens": data.tokens}, {"origin": data.origin})
    return data


def _fingerprint(
    job: TuneJob, source: Source, text: CalibrationData | None, start: Start | None
) -> dict[str, Any]:
    return {
        "model": source.digest,
        "data": "sampled from the model" if text is None else text.digest,
        "recipe": job.recipe.record(),
        **({} if start is None else {"start": start_digest(start)}),
    }
