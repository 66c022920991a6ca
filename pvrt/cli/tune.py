"""`pvrt tune`: from a dense model to a checkpoint."""

import signal
from pathlib import Path
from typing import Annotated

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
    Samples,
    Scheme,
)
from pvrt.cli.shared import EXIT_INTERRUPTED, say
from pvrt.errors import RunError


def tune(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the checkpoint.")],
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
        int | None, typer.Option(help="Seed of everything random. [default: 0]")
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
    changes = Changes(scheme, samples, length, seed, pv, embeddings, bits)
    notice = say if parallel.speaks() else lambda line: None
    recipe, seconds = build(effort.value, config, changes, limit, notice)
    job = TuneJob(
        model,
        out,
        recipe,
        data,
        checked_device(device),
        activations.value,
        seconds=seconds,
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

        print(as_text(describe(checkpoint), shown=3))
        print(f"next: pvrt serve {out}")
