"""`pvrt eval`: perplexity of a checkpoint or of a dense model."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import pvrt
from pvrt.cli.shared import AsJson, Dtype


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, or any model tune takes.")],
    text: Annotated[
        Path | None,
        typer.Option(help="A text file. Without it: the language reference of this Python."),
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    windows: Annotated[
        int | None, typer.Option(min=1, help="At most this many windows (default: all).")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: float32 on a CPU.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Perplexity on held-out text (non-overlapping windows)."""
    from pvrt.device import checked_device
    from pvrt.tools import perplexity as ev

    place = checked_device(device)
    name = str(text) if text is not None else "the Python language reference"
    body = ev.read_text(text) if text is not None else ev.default_text()
    loaded, tokenizer = _load_any(model, dtype, place)

    started = last = time.monotonic()

    def progress(done: int, total: int, value: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 10 or done == total:
            left = (now - started) / done * (total - done)
            print(f"window {done}/{total}  {value:.3f}  {left:.0f} s left", file=sys.stderr)
            last = now

    tokens = ev.windows(body, tokenizer, context, windows)
    result = ev.perplexity(loaded, tokens, name, progress)
    if as_json:
        print(json.dumps({"model": model, **asdict(result)}))
    else:
        print(
            f"perplexity {result.value:.4f} @ {result.context} tokens, {result.windows} windows "
            f"of {result.text}"
        )


def _load_any(model: str, dtype: Dtype, device: str) -> tuple[Any, Any]:
    """A dense model or a checkpoint, decoded once, with its tokenizer."""
    import torch

    from pvrt.format.aqlm import read_config

    path = Path(model)
    chosen = dtype.value
    if dtype is Dtype.auto:
        chosen = "float32" if device == "cpu" else "auto"
    if path.is_dir() and read_config(path).get("quantization_config"):
        from transformers import AutoTokenizer

        loaded = pvrt.load(path, dense=True, dtype=chosen)
        return loaded.to(device), AutoTokenizer.from_pretrained(path)
    from pvrt_tune.data.source_model import load_source

    source = load_source(model)
    wanted = None if chosen == "auto" else getattr(torch, chosen)
    return source.dense(wanted, device), source.tokenizer
