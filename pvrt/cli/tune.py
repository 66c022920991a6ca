"""`pvrt tune`: from a dense model to a checkpoint."""

import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvrt.cli.recipe import (
    PV,
    Activations,
    ActivationsOption,
    Bits,
    Config,
    Data,
    Effort,
    EffortOption,
    KeepEmbeddings,
    Length,
    Limit,
    Model,
    Original,
    Samples,
    Scheme,
    beginning,
)
from pvrt.cli.shared import EXIT_INTERRUPTED, Dtype, notice, say
from pvrt.errors import RunError

if TYPE_CHECKING:
    from pvrt.tools.compare import Comparison
    from pvrt_tune.settings import TuneJob


def tune(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the checkpoint.")],
    original: Original = None,
    scheme: Scheme = None,
    bits: Bits = None,
    data: Data = None,
    effort: EffortOption = Effort.standard,
    config: Config = None,
    limit: Limit = None,
    pv: PV = True,
    samples: Samples = None,
    length: Length = None,
    keep_embeddings: KeepEmbeddings = False,
    seed: Annotated[
        int | None, typer.Option(show_default="0", help="Seed of everything random.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.")
    ] = "auto",
    activations: ActivationsOption = Activations.auto,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", "--continue", help="Go on with the run in OUT; fail if there is none."
        ),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard the run in OUT and start again.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start although the plan says that it does not fit.")
    ] = False,
    report: Annotated[
        bool,
        typer.Option(
            "--report/--no-report",
            help="Compare with the original at the end: report.html and README.md in OUT.",
        ),
    ] = True,
) -> None:
    """Compress a model. Interrupt it at any time: the same command goes on where it stopped."""
    from pvrt.device import checked_device
    from pvrt_tune import parallel
    from pvrt_tune.pipeline import tune as run
    from pvrt_tune.settings import TuneJob
    from pvrt_tune.settings.options import Changes, build

    if resume and restart:
        raise RunError("--resume and --restart exclude each other; give one of them")
    embeddings = "keep" if keep_embeddings else None
    model, start = beginning(model, original)
    changes = Changes(scheme, samples, length, seed, pv, embeddings, bits, start)
    tell = say if parallel.speaks() else lambda line: None
    recipe, seconds = build(effort.value, config, changes, limit, tell)
    job = TuneJob(
        model,
        out,
        recipe,
        data,
        checked_device(device),
        activations.value,
        seconds=seconds,
        start=start,
        resume=resume,
        restart=restart,
        force=force,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        checkpoint = run(job, say)
    except KeyboardInterrupt:
        if parallel.speaks():
            say(f"stopped; what is finished is in {out}. The same command goes on from there.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if parallel.speaks():
        from pvrt.tools.report import as_text, describe

        print(as_text(describe(checkpoint), shown=3), flush=True)
        if report:
            _describe(job)
        print(f"next: pvrt serve {out}")


def _describe(job: "TuneJob") -> None:
    """Write report and model card beside a checkpoint, if they are not there already.

    The checkpoint is complete, so that nothing that fails here is more than a warning.
    """
    from pvrt_tune.model_card import CARD_FILE, REPORT_FILE

    if all((job.out / name).exists() for name in (CARD_FILE, REPORT_FILE)):
        return
    again = shlex.join(["pvrt", "compare", job.model, str(job.out), "--html", "FILE"])
    say("comparing it with the original (--no-report leaves this out)")
    started = time.monotonic()
    try:
        _write_description(job)
    except KeyboardInterrupt:
        say(f"stopped; the checkpoint in {job.out} is complete. For its report: {again}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except Exception as error:  # whatever it is, hours of work are safe on the disk
        notice(f"warning: the checkpoint is complete, its report is not: {error}. Again: {again}")
        return
    say(f"{REPORT_FILE} and {CARD_FILE} took {time.monotonic() - started:.0f} s")


def _write_description(job: "TuneJob") -> None:
    """Model card, report, and the card once more with the report's figures."""
    import pvrt
    from pvrt.cli.compare import CONTEXT, WINDOWS, compared
    from pvrt.cli.opening import open_folder, open_original
    from pvrt.format.atomic import replace
    from pvrt.format.grid import open_checkpoint
    from pvrt.tools.held_out import HeldOut
    from pvrt.tools.html_report import as_html
    from pvrt_tune.data.provenance import Provenance
    from pvrt_tune.model_card import CARD_FILE, REPORT_FILE, model_card

    command, origin = shlex.join(["pvrt", *sys.argv[1:]]), Provenance.of(job.model)

    def write_card(found: "Comparison | None") -> None:
        card = model_card(open_checkpoint(job.out), origin, command, found)
        replace(job.out / CARD_FILE, card.encode())

    write_card(None)
    original = open_original(job.model, Dtype.auto, job.device)
    model = open_folder(job.out, Dtype.auto, job.device)
    # No text of a run, and the same for all of them.
    found = compared(original, [model], HeldOut.read(None, None, CONTEXT, WINDOWS))
    foot = f"Made by {command}, measured by pvrt {pvrt.__version__}."
    replace(job.out / REPORT_FILE, as_html(found, foot).encode())
    write_card(found)
