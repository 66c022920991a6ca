"""`pvrt eval`: perplexity, KL to the original, and the field's tasks."""

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvrt.cli.opening import open_any, open_original, progress
from pvrt.cli.shared import AsJson, Dtype, notice
from pvrt.errors import DataError

if TYPE_CHECKING:
    from pvrt.tools.compare import Side
    from pvrt.tools.held_out import HeldOut

_CONTEXT = 2048


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, or any model tune takes.")],
    text: Annotated[
        Path | None,
        typer.Option(help="A text file. Without it: the language reference of this Python."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, show_default="2048", help="Tokens per window.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="At most this many windows (default: all).")
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
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many items per task.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before each item (default: the task's).")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, show_default="8", help="Sequences of tasks at once.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: float32 on a CPU.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Perplexity on held-out text, KL to the original, and scores of tasks."""
    if tasks is None and (limit, shots, batch) != (None, None, None):
        raise DataError("--limit, --shots and --batch are for --tasks; give it as well")
    on_text = tasks is None or text is not None or kl is not None
    if not on_text and (context, windows) != (None, None):
        raise DataError(
            "--context and --windows are for text; --tasks alone reads none: add --text"
        )
    if kl is not None and kl == model:
        raise DataError(f"--kl {kl} is the model itself; give the original that it was made of")

    from pvrt.device import checked_device
    from pvrt.tools.held_out import HeldOut
    from pvrt.tools.tasks import Harness, split_tasks

    place = checked_device(device)
    held_out = HeldOut.read(text, context, _CONTEXT, windows) if on_text else None
    harness = None if tasks is None else Harness(split_tasks(tasks))
    side = open_any(model, dtype, place)
    if kl is None:  # which leaves of a model its head alone
        side = replace(side, load=cache(side.load))  # one for text and tasks
    results: dict[str, Any] = {"model": model}
    if held_out is not None and kl is None:
        results |= _perplexity(side, held_out)
    elif held_out is not None and kl is not None:
        results |= _kl(side, open_original(kl, dtype, place), held_out)
    if harness is not None:
        results["tasks"] = harness.run(side.load(None), side.tokenizer, limit, shots, batch or 8)
    print(json.dumps(results) if as_json else _as_text(results))


def _perplexity(side: "Side", text: "HeldOut") -> dict[str, Any]:
    from pvrt.tools.perplexity import perplexity

    tokens = text.windows(side.tokenizer, side.longest, notice)
    return asdict(perplexity(side.load(None), tokens, text.name, progress("window")))


def _kl(side: "Side", original: "Side", text: "HeldOut") -> dict[str, Any]:
    """Perplexity and KL; the two models are in memory one after the other."""
    from pvrt.tools.compare import Probe, compare, shared_windows

    tokens = shared_windows(text, original, [side], notice)
    original, side = (replace(each, speed=lambda: None) for each in (original, side))
    found = compare(original, [side], Probe(tokens, text.name), progress)
    (figures,) = found.models
    assert figures.kl is not None
    return {
        "value": figures.perplexity,
        "context": found.context,
        "windows": found.windows,
        "text": text.name,
        "original": original.name,
        "original_value": found.original.perplexity,
        "kl": asdict(figures.kl),
        "noise_floor": asdict(found.noise_floor),
    }


def _as_text(results: dict[str, Any]) -> str:
    lines = []
    if "value" in results:
        original = f" (original {results['original_value']:.4f})" if "kl" in results else ""
        lines.append(
            f"perplexity {results['value']:.4f}{original} @ {results['context']} tokens, "
            f"{results['windows']} windows of {results['text']}"
        )
    if "kl" in results:
        kl, floor = results["kl"], results["noise_floor"]
        lines += [
            f"KL to the original {kl['mean']:.5f} +- {kl['standard_error']:.5f} nats per token "
            f"(median {kl['median']:.5f}, 99% below {kl['percentile_99']:.3f}); "
            f"the same likeliest token at {kl['same_top']:.1%}",
            f"noise floor {floor['mean']:.6f} +- {floor['standard_error']:.6f}: the original in "
            "bfloat16 against float32",
        ]
    for name, scores in results.get("tasks", {}).items():
        for metric, score in scores.items():
            measure, comma, kind = metric.partition(",")
            if comma and not measure.endswith("_stderr") and isinstance(score, int | float):
                error = scores.get(f"{measure}_stderr,{kind}")
                spread = f" +- {error:.4f}" if isinstance(error, float) else ""
                lines.append(f"{name} {measure} {score:.4f}{spread} ({scores['items']} items)")
    return "\n".join(lines)
