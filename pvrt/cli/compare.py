"""`pvrt compare`: a model and what was made of it, side by side."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import pvrt
from pvrt.cli.opening import open_folder, open_original, progress
from pvrt.cli.shared import AsJson, Dtype, notice
from pvrt.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pvrt.tools.compare import Comparison, Side
    from pvrt.tools.held_out import HeldOut

#: Of the default text: enough for a KL to a few percent, in about a minute for a small model.
CONTEXT, WINDOWS, NEW_TOKENS = 512, 8, 48


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
        int | None, typer.Option(min=3, show_default=str(CONTEXT), help="Tokens per window.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="At most this many windows.")] = WINDOWS,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Ask this (repeat for more) instead of the usual questions."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = NEW_TOKENS,
    html: Annotated[
        Path | None, typer.Option(help="Also write a report with plots to this file.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Type that OUT computes in. auto: float32 on a CPU.")
    ] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Quality, size, speed and greedy answers beside the original's, and where they part.

    KL is of the next token's distribution, original || OUT in nats, on held-out text. Models are in
    memory one at a time.
    """
    from pvrt.device import checked_device
    from pvrt.format.atomic import replace, try_writing
    from pvrt.tools.compare_text import as_text
    from pvrt.tools.held_out import HeldOut
    from pvrt.tools.html_report import as_html

    if html is not None:
        try:
            html.parent.mkdir(parents=True, exist_ok=True)
            try_writing(html.parent)
            if html.is_dir():
                raise IsADirectoryError("it is a folder")
        except OSError as error:
            raise DataError(f"--html {html} cannot be written: {error}") from error
    if len(set(outs)) < len(outs):
        raise DataError("a folder is given twice; give every OUT once")
    place = checked_device(device)
    held_out = HeldOut.read(text, context, CONTEXT, windows)
    sides = [open_folder(out, dtype, place) for out in outs]
    found = compared(open_original(original, dtype, place), sides, held_out, prompt, new_tokens)
    if html is not None:
        replace(html, as_html(found, f"Measured by pvrt {pvrt.__version__}.").encode())
        notice(f"report: {html}")
    print(json.dumps(asdict(found)) if as_json else as_text(found))


def compared(
    original: "Side",
    models: "Sequence[Side]",
    text: "HeldOut",
    prompts: "Sequence[str] | None" = None,
    new_tokens: int = NEW_TOKENS,
) -> "Comparison":
    """The comparison on windows that all sides can read, with progress on stderr."""
    from pvrt.tools.compare import Probe, compare, default_prompts, shared_windows

    tokens = shared_windows(text, original, models, notice)
    asked = tuple(prompts or default_prompts(original.tokenizer))
    return compare(original, models, Probe(tokens, text.name, asked, new_tokens), progress)
