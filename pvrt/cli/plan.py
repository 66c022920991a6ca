"""`pvrt plan`: what `pvrt tune` with the same options would need and give."""

import json
from pathlib import Path
from typing import Annotated

import typer

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
from pvrt.cli.shared import EXIT_PROBLEM, AsJson, notice


def plan(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the checkpoint: whose disk is asked.")
    ] = Path(),
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
    device: Annotated[
        str, typer.Option(help="As for tune; a GPU may be planned for where there is none.")
    ] = "auto",
    host_memory: Annotated[
        float | None, typer.Option(min=0, help="GB of host memory (default: what is free here).")
    ] = None,
    device_memory: Annotated[
        float | None, typer.Option(min=0, help="GB of GPU memory (default: what is free here).")
    ] = None,
    card: Annotated[
        str | None, typer.Option(help='Plan for a card by name, like "RTX 4090", not here or here.')
    ] = None,
    activations: ActivationsOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Say what tune would need and give: memory, disk, time, size. It reads config.json alone.

    The exit code is 1 if the run does not fit.
    """
    from pvrt_tune.plan.on_machine import plan_here
    from pvrt_tune.plan.report import as_text
    from pvrt_tune.settings import TuneJob
    from pvrt_tune.settings.options import Changes, build

    embeddings = "keep" if keep_embeddings else None
    dense, start = (model, None) if original is None else (original, Path(model))
    changes = Changes(scheme, samples, length, None, pv, embeddings, bits, start)
    time = seconds(limit)
    recipe = build(effort, config, changes, time, notice)
    job = TuneJob(dense, out, recipe, data, device, activations, seconds=time, start=start)
    report, problems = plan_here(
        job, host_memory=host_memory, device_memory=device_memory, card=card
    )
    if as_json:
        print(json.dumps({**report, "problems": problems}))
    else:
        print(as_text(report))
        print("this run does not fit:" if problems else "this run fits")
        for problem in problems:
            print(f"- {problem}")
    if problems:
        raise typer.Exit(EXIT_PROBLEM)
