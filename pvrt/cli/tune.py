"""`pvrt tune`: from a dense model to a checkpoint."""

import signal
from pathlib import Path
from typing import Annotated

import typer

import pvrt
from pvrt.api.arguments import at_most_one
from pvrt.cli.plan import plan
from pvrt.cli.recipe import (
    PV,
    ActivationsOption,
    Bits,
    Config,
    Data,
    EffortOption,
    KeepEmbeddings,
    Length,
    Limit,
    Model,
    Original,
    Samples,
    Scheme,
    seconds,
)
from pvrt.cli.shared import EXIT_INTERRUPTED
from pvrt.cli.terminal import Terminal, chosen
from pvrt.progress import RESULT, Event


def tune(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the checkpoint.")],
    original: Original = None,
    scheme: Scheme = None,
    bits: Bits = None,
    data: Data = None,
    effort: EffortOption = "standard",
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
    activations: ActivationsOption = "auto",
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what pvrt plan says, and do nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings only.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print progress and result as JSON, a line each.")
    ] = False,
) -> None:
    """Compress a model. Interrupt it at any time: the same command goes on where it stopped."""
    time = seconds(limit)
    at_most_one(resume=resume, restart=restart)  # of a dry run, too
    if dry_run:
        plan(
            model,
            out,
            original=original,
            scheme=scheme,
            bits=bits,
            data=data,
            effort=effort,
            config=config,
            limit=limit,
            pv=pv,
            samples=samples,
            length=length,
            keep_embeddings=keep_embeddings,
            device=device,
            activations=activations,
            as_json=as_json,
        )
        return
    terminal = Terminal(chosen(as_json=as_json, quiet=quiet))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with terminal.live():
            checkpoint = pvrt.tune(
                model,
                out,
                bits=bits,
                scheme=scheme,
                data=data,
                minutes=None if time is None else time / 60,
                on_progress=terminal,
                effort=effort,
                config=config,
                original=original,
                pv=pv,
                samples=samples,
                length=length,
                keep_embeddings=keep_embeddings,
                seed=seed,
                device=device,
                activations=activations,
                resume=resume,
                restart=restart,
                force=force,
                report=report,
            )
    except KeyboardInterrupt:
        from pvrt_tune import parallel

        if parallel.speaks():
            terminal(stopped(out, terminal.course.stage))
        raise typer.Exit(EXIT_INTERRUPTED) from None
    from pvrt_tune import parallel

    if parallel.speaks():
        from pvrt.tools.report import as_text, describe

        found = describe(checkpoint)
        terminal(Event(as_text(found, shown=3), RESULT, **found))
        terminal(f"next: pvrt serve {out}")


def stopped(out: Path, stage: str) -> str:
    """What is left after Ctrl-C in a stage."""
    if stage == "sampling":
        return "stopped; the same command begins with the calibration text again. --data gives one."
    return f"stopped; what is finished is in {out}. The same command goes on from there."
