"""One step of PV-Tuning on SmolLM2: writes results/pv_step.json.

    .venv/bin/python benchmarks/pv_step.py [--folder DIR] [--repeats 5]

Tokens per second and the share of the time that the V step takes, at several numbers of tokens per
step, with one thread and with all. The model is calibrated first (minutes; --folder keeps that);
what the original model says of the windows is computed outside the time. The first two steps of
every setting do not count: they search most groups for the first time.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import machine
import results
import torch
from pv_strategies import FOLDER, SUBJECTS, Bench, say

from pvrt_tune.data.source_model import load_source
from pvrt_tune.data.text import CalibrationData
from pvrt_tune.distil.loss import TEACHER_CHUNK, Teacher
from pvrt_tune.distil.stage import calibrated
from pvrt_tune.distil.student import Student
from pvrt_tune.distil.trainer import Trainer
from pvrt_tune.machine import compute_dtype

MODEL = "smollm2-135m"


def all_in_memory(original: Any, text: CalibrationData) -> Teacher:
    """What the original model says, kept by no run folder.

    Documents that share a window see each other, as PV-Tuning has it by default.
    """
    packed = replace(text, positions=None)
    return Teacher(
        original, packed, TEACHER_CHUNK, lambda number: None, lambda number, states: None
    )


def steps(bench: Bench, teacher: Teacher, batch: int, repeats: int) -> list[dict[str, float]]:
    """Figures of some steps of the default strategy, `batch` windows each."""
    recipe = bench.subject.recipe
    assert recipe.training is not None
    settings = replace(recipe.training, batch=batch, microbatch=min(batch, 4))
    compute = compute_dtype(settings.compute, bench.job.device)
    student = Student.of(calibrated(bench.calibrated), compute)
    trainer = Trainer(student, teacher, teacher.data, replace(recipe, training=settings))
    first = settings.held_out
    teacher.prepare(range(first, first + (repeats + 2) * batch))
    return [trainer.train_step() for _ in range(repeats + 2)][2:]


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    subject = SUBJECTS[MODEL]
    source = load_source(str(subject.source()))
    bench = Bench(MODEL, subject, source, subject.schemes[0], options.folder)
    length = bench.data.tokens.shape[1]
    original = source.dense(torch.float32)
    teacher = all_in_memory(original, bench.data)
    rows: list[dict[str, Any]] = []
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        for tokens in options.tokens:
            figures = steps(bench, teacher, tokens // length, options.repeats)
            seconds = median(step["seconds"] for step in figures)
            row = {
                "model": MODEL,
                "scheme": bench.scheme,
                "threads": threads,
                "tokens_per_step": tokens,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "v_share": median(step["v_seconds"] / step["seconds"] for step in figures),
                "changed": median(step["changed"] for step in figures),
                "shared_machine": machine.shared(threads),
                **machine.describe(),
            }
            rows.append(row)
            say(str(row))
    results.store("pv_step", rows)


if __name__ == "__main__":
    main()
