"""The stage after calibration: PV-Tuning of the whole model, and the tensors it leaves."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pvrt_tune import parallel
from pvrt_tune.calibrate.ends import put_ends
from pvrt_tune.calibrate.stage import rebuild
from pvrt_tune.data.source_model import fill
from pvrt_tune.data.text import CalibrationData
from pvrt_tune.distil.loss import TEACHER_CHUNK, Teacher, check_head
from pvrt_tune.distil.student import Student
from pvrt_tune.distil.trainer import BEST, Trainer
from pvrt_tune.machine import compute_dtype, release_memory
from pvrt_tune.original import original
from pvrt_tune.progress import Clock, Report
from pvrt_tune.run import Run
from pvrt_tune.settings import Recipe
from pvrt_tune.store import Store


def pv_tune(run: Run, deadline: float | None) -> bool:
    """Tune the calibrated blocks of a run against the original model's logits.

    The first `held_out` windows of its data choose the best student, which is kept as a piece; the
    others train. Returns whether the planned steps were all done (or patience ended them); False
    when the deadline (time.monotonic) came first.
    """
    recipe, report = run.recipe, run.report
    settings = recipe.training
    assert settings is not None
    data = run.data if settings.separate_documents else replace(run.data, positions=None)
    # Ranks on unlike machines would answer differently.
    compute = parallel.agreed(compute_dtype(settings.compute, run.device))
    model = original(run.source, compute if run.device == "cpu" else None, run.settings)
    sample = data.tokens[:1, :32].to(run.device)
    check_head(model, sample, separate_documents=settings.separate_documents)
    teacher = teacher_of(model, data, run.store)
    del model
    if settings.teacher_first:
        teacher.finish(_progress(len(data), report))
        release_memory()
    student = Student.of(calibrated(run), compute, stream=settings.states == "host")
    trainer = Trainer(student, teacher, data, recipe)
    report(_start_line(recipe, data))
    return trainer.run(run.store, report, deadline).complete


def tuned_tensors(store: Store) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The best student's tensors by checkpoint name, and what the manifest says about them."""
    for name in reversed(store.names(BEST)):
        best = store.load(name)
        if best is not None:
            return best.tensors, best.report
    return {}, {}


def calibrated(run: Run) -> Any:
    """The whole calibrated model in float32 on the device, from the source and finished blocks."""
    model = run.source.partial(run.source.outside(run.blocks.name), run.device)
    fill(model, {name: t.to(run.device) for name, t in run.outside().items()}, run.device)
    listed = model.get_submodule(run.blocks.name)
    for index, (_, piece) in enumerate(run.finished_blocks()):
        listed[index] = rebuild(run, index, piece.tensors)
    model.tie_weights()
    ends = run.ends()
    if ends is not None:
        put_ends(model, ends, run.device)
    for parameter in model.parameters():  # a tensor of the source may be a view of its file
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32, copy=True)
    return model


def teacher_of(model: Any, data: CalibrationData, store: Store) -> Teacher:
    """The original model as a teacher whose states are pieces of the run, on every rank."""

    def load(number: int) -> Tensor | None:
        piece = store.load(_states_name(number))
        return None if piece is None else piece.tensors["hidden"]

    def save(number: int, hidden: Tensor | None) -> None:
        def write() -> tuple[str, str] | None:
            name = _states_name(number)
            return None if hidden is None else (name, store.write(name, {"hidden": hidden}))

        def note(pieces: list[tuple[str, str] | None]) -> None:
            for name, digest in filter(None, pieces):
                store.note(name, [digest], {})

        written = parallel.together(write)
        parallel.together(lambda: note(written))

    return Teacher(model, data, TEACHER_CHUNK, load, save)


def _states_name(chunk: int) -> str:
    return f"teacher-{chunk:05d}"


def _progress(count: int, report: Report) -> Callable[[int, int], None]:
    clock = Clock(count)

    def progress(done: int, total: int) -> None:
        clock.done = done
        if done == total or clock.due():
            report(clock.event("original model", f"original model: window {done}/{total}"))

    return progress


def _start_line(recipe: Recipe, data: CalibrationData) -> str:
    settings = recipe.training
    assert settings is not None
    tokens, held_out = data.tokens.shape[1] * settings.batch, settings.held_out
    return (
        f"PV-Tuning ({recipe.pv.strategy}): up to {settings.steps} steps of {tokens} tokens "
        f"over {len(data) - held_out} windows, best state by {held_out} held-out windows"
    )
