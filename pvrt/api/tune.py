"""`pvrt.tune`: from a dense model to a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pvrt.api.arguments import Activations, Effort, as_command, at_most_one, one_of
from pvrt.api.lines import Tell, silent

if TYPE_CHECKING:
    from pvrt.format.aqlm import Checkpoint
    from pvrt.format.grid import GridCheckpoint


def tune(
    model: str | Path,
    out: str | Path,
    *,
    bits: float | None = None,
    scheme: str | None = None,
    data: str | Path | None = None,
    minutes: float | None = None,
    on_progress: Tell | None = None,
    effort: Effort = "standard",
    config: str | Path | None = None,
    original: str | Path | None = None,
    pv: bool = True,
    samples: int | None = None,
    length: int | None = None,
    keep_embeddings: bool = False,
    seed: int | None = None,
    device: str = "auto",
    activations: Activations = "auto",
    resume: bool = False,
    restart: bool = False,
    force: bool = False,
    report: bool = True,
) -> "Checkpoint | GridCheckpoint":
    """Compress a model to a checkpoint (`pvrt tune`).

    A call that was interrupted goes on where it stopped when it is made again. Ctrl-C, or any
    exception that `on_progress` raises, may interrupt it: finished blocks are safe in `out`.

    Args:
        model: A model folder, a .gguf file or a hub id; with `original` a checkpoint.
        out: The folder for the checkpoint.
        bits: Of each weight over the whole file; schemes are then chosen layer by layer.
        scheme: One for all layers, instead: 2x8g8 is 2 bits, 3x8g8 is 3; or a grid like w4g128.
        data: Calibration text: a file, a folder, or a data set of the hub. Without it the model
            writes its own.
        minutes: The time for all but the report (`--for`); the best checkpoint by then is left.
        on_progress: Gets every line that the command prints on the way.
        effort: Time against quality: "quick", "standard" or "best".
        config: A YAML or JSON file with settings of the recipe, over `effort`.
        original: The dense original of `model`; PV-Tuning goes on from its codes (`--from`).
        pv: PV-Tuning after calibration, if `effort` has it.
        samples: Calibration windows.
        length: Tokens of a window.
        keep_embeddings: Embeddings and output head stay in 16 bits.
        seed: Of everything random (0).
        device: "auto", "cpu", "cuda" or "cuda:N".
        activations: Where hidden states are kept.
        resume: Raise unless there is a run in `out` to go on with.
        restart: Discard the run in `out`.
        force: Start although the plan says that it does not fit.
        report: Compare with the original at the end: report.html and README.md in `out`. If that
            fails, the logger `pvrt` warns, for the checkpoint is complete.

    Returns:
        The checkpoint, opened, for `pvrt.load`, `pvrt.evaluate` and `pvrt.compare`.

    Raises:
        SourceError: The model cannot be read, or cannot be tuned.
        DataError: The text cannot be used.
        RunError: An argument cannot be, the run does not fit here, or `out` holds another one.
        CheckpointError: The checkpoint cannot be written.
    """
    one_of("effort", effort, get_args(Effort))
    one_of("activations", activations, get_args(Activations))
    at_most_one(resume=resume, restart=restart)
    from pvrt.api.describe import describe
    from pvrt.device import checked_device
    from pvrt_tune import parallel
    from pvrt_tune.pipeline import tune as run
    from pvrt_tune.settings import TuneJob
    from pvrt_tune.settings.options import Changes, build

    tell = on_progress if on_progress and parallel.speaks() else silent
    dense, start = (model, None) if original is None else (original, Path(model))
    embeddings = "keep" if keep_embeddings else None
    changes = Changes(scheme, samples, length, seed, pv, embeddings, bits, start)
    seconds = None if minutes is None else 60.0 * minutes
    file = None if config is None else Path(config)
    job = TuneJob(
        str(dense),
        Path(out),
        build(effort, file, changes, seconds, tell),
        None if data is None else str(data),
        checked_device(device),
        activations,
        seconds=seconds,
        start=start,
        resume=resume,
        restart=restart,
        force=force,
    )
    checkpoint = run(job, tell)
    if report and parallel.speaks():
        command = as_command(
            *("tune", model, "-o", out),
            **{"from": original, "scheme": scheme, "bits": bits, "data": data, "config": config},
            **{"for": minutes and f"{round(60 * minutes)}s", "samples": samples, "length": length},
            effort=None if effort == "standard" else effort,
            seed=seed,
            **{"keep-embeddings": keep_embeddings, "no-pv": not pv},
        )
        describe(job, command, tell)
    return checkpoint
