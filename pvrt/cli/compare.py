"""`pvrt compare`: a model and what was made of it, side by side."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import pvrt
from pvrt.api.arguments import Dtype
from pvrt.api.compare import CONTEXT, NEW_TOKENS, WINDOWS
from pvrt.cli.shared import AsJson, notice


def compare(
    original: Annotated[
        str, typer.Argument(help="The dense model: a folder, a .gguf file, or a hub id.")
    ],
    outs: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Folders of what was made of it.")
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            help="Held-out text. Without it: the language reference of this Python. Never give the "
            "text that calibrated a model."
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(show_default=str(CONTEXT), help="Tokens per window.")
    ] = None,
    windows: Annotated[int, typer.Option(help="At most this many windows.")] = WINDOWS,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Ask this (repeat for more) instead of the usual questions."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = NEW_TOKENS,
    html: Annotated[
        Path | None, typer.Option(help="Also write a report with plots to this file.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Type that OUT computes in. auto: float32 on a CPU.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Quality, size, speed and greedy answers beside the original's, and where they part.

    KL is of the next token's distribution, original || OUT in nats, on held-out text. Models are in
    memory one at a time.
    """
    found = pvrt.compare(
        original,
        *outs,
        text=text,
        context=context,
        windows=windows,
        prompts=prompt or (),
        new_tokens=new_tokens,
        html=html,
        dtype=dtype,
        device=device,
        on_progress=notice,
    )
    if as_json:
        print(json.dumps(asdict(found)))
        return
    from pvrt.tools.compare_text import as_text

    print(as_text(found))
