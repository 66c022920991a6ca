"""`pvrt.compare`: a model and what was made of it, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pvrt.api.arguments import Dtype, at_least, name_of
from pvrt.api.lines import Tell, passes, silent
from pvrt.errors import DataError
from pvrt.version import __version__

if TYPE_CHECKING:
    from pvrt.format.folder import StoredModel
    from pvrt.tools.compare import Comparison, Side
    from pvrt.tools.held_out import HeldOut

#: Of the default text: enough for a KL to a few percent, in about a minute for a small model.
CONTEXT, WINDOWS, NEW_TOKENS = 512, 8, 48


def compare(
    original: str | Path,
    *outs: "str | Path | StoredModel",
    text: str | Path | None = None,
    context: int | None = None,
    windows: int = WINDOWS,
    prompts: Sequence[str] = (),
    new_tokens: int = NEW_TOKENS,
    html: str | Path | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    on_progress: Tell | None = None,
) -> "Comparison":
    """Compare quality, size, speed and greedy answers with the original's (`pvrt compare`).

    KL is of the next token's distribution, original || out in nats, on held-out text. Models are in
    memory one at a time.

    Args:
        original: The dense model: a folder, a .gguf file or a hub id.
        outs: What was made of it: folders, or what `pvrt.tune` returned.
        text: A file of held-out text. Without it: the language reference of this Python.
        context: Tokens of a window (512, or what the models can read if that is less).
        windows: At most so many windows.
        prompts: Asked instead of the usual questions.
        new_tokens: Of the longest answer.
        html: A file that gets a report with plots.
        dtype: The type that outs compute in.
        device: "auto", "cpu", "cuda" or "cuda:N".
        on_progress: Gets lines about what is done.

    Returns:
        All figures and answers; `dataclasses.asdict` makes what `--json` prints.

    Raises:
        DataError: The text, or the tokenizers, cannot be used.
        CheckpointError: A folder is not sound.
        SourceError: The original cannot be read.
        RunError: A model does not fit the memory, or an argument is out of its range.
    """
    from pvrt.api.opening import Opener
    from pvrt.tools.held_out import HeldOut

    at_least(3, context=context)
    at_least(1, windows=windows, new_tokens=new_tokens)
    tell = on_progress or silent
    report = None if html is None else Path(html)
    if report is not None:
        _try_writing(report)
    if not outs:
        raise DataError("nothing is given to compare with the original; give a folder")
    if len({name_of(out) for out in outs}) < len(outs):
        raise DataError("a folder is given twice; give every OUT once")
    opener = Opener.of(device, dtype, tell)
    held_out = HeldOut.read(None if text is None else Path(text), context, CONTEXT, windows)
    sides = [opener.folder(out) for out in outs]
    found = compared(opener.original(original), sides, held_out, tell, (prompts, new_tokens))
    if report is not None:
        write_report(report, found, "Measured")
        tell(f"report: {report}")
    return found


def compared(
    original: "Side",
    models: "Sequence[Side]",
    text: "HeldOut",
    tell: Tell,
    asked: tuple[Sequence[str], int] = ((), NEW_TOKENS),
) -> "Comparison":
    """The comparison on windows that all sides can read. asked: prompts (none: the usual ones), and
    tokens of the longest answer.
    """
    from pvrt.tools.compare import Probe, compare, default_prompts, shared_windows

    tokens = shared_windows(text, original, models, tell)
    prompts = tuple(asked[0]) or default_prompts(original.tokenizer)
    return compare(original, models, Probe(tokens, text.name, prompts, asked[1]), passes(tell))


def write_report(report: Path, found: "Comparison", how: str) -> None:
    """Write a comparison with plots; its last line is `how` it was measured."""
    from pvrt.format.atomic import replace
    from pvrt.tools.html_report import as_html

    replace(report, as_html(found, f"{how} by pvrt {__version__}.").encode())


def _try_writing(report: Path) -> None:
    """Raise DataError where a report could not be written in the end."""
    from pvrt.format.atomic import try_writing

    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        try_writing(report.parent)
        if report.is_dir():
            raise IsADirectoryError("it is a folder")
    except OSError as error:
        raise DataError(f"--html {report} cannot be written: {error}") from error
