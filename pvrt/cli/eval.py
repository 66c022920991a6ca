"""`pvrt eval`: perplexity, KL to the original, and the field's tasks."""

import json
from pathlib import Path
from typing import Annotated

import typer

import pvrt
from pvrt.api.arguments import Dtype
from pvrt.api.evaluate import BATCH, CONTEXT
from pvrt.cli.shared import AsJson, notice


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, or any model tune takes.")],
    text: Annotated[
        Path | None,
        typer.Option(help="A text file. Without it: the language reference of this Python."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(show_default=str(CONTEXT), help="Tokens per window.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="At most this many windows (default: all).")
    ] = None,
    kl: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL",
            help="Also KL to this dense model over the same windows, with its noise floor.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Tasks of lm-eval between commas, task files (.yaml) or folders of them; "
            "perplexity then only with --text or --kl.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many items per task.")] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples before each item (default: the task's).")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(show_default=str(BATCH), help="Sequences of tasks at once."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: float32 on a CPU.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Perplexity on held-out text, KL to the original, and scores of tasks."""
    found = pvrt.evaluate(
        model,
        original=kl,
        text=text,
        context=context,
        windows=windows,
        tasks=tasks,
        limit=limit,
        shots=shots,
        batch=batch,
        dtype=dtype,
        device=device,
        on_progress=notice,
    )
    if as_json:
        print(json.dumps(found.record()))
        return
    from pvrt.tools.evaluation import as_text

    print(as_text(found))
