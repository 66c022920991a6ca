"""`pvrt.evaluate`: perplexity, KL to the original, and the field's tasks."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pvrt.api.arguments import Dtype, at_least, name_of
from pvrt.api.lines import Tell, passes, silent
from pvrt.errors import DataError

if TYPE_CHECKING:
    from pvrt.format.folder import StoredModel
    from pvrt.tools.compare import Side
    from pvrt.tools.evaluation import Evaluation
    from pvrt.tools.held_out import HeldOut

#: Tokens of a window, and sequences of tasks at once, where nobody says.
CONTEXT, BATCH = 2048, 8


def evaluate(
    model: "str | Path | StoredModel",
    *,
    original: str | Path | None = None,
    text: str | Path | None = None,
    context: int | None = None,
    windows: int | None = None,
    tasks: str | Sequence[str] | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch: int | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    on_progress: Tell | None = None,
) -> "Evaluation":
    """Measure perplexity on held-out text, KL to the original, and tasks (`pvrt eval`).

    Args:
        model: A checkpoint folder, any model that `pvrt.tune` takes, or what it returned.
        original: A dense model; KL to it is measured over the same windows, with its noise floor
            (`--kl`).
        text: A text file. Without it: the language reference of this Python.
        context: Tokens of a window (2048, or what the model can read if that is less).
        windows: At most so many windows (all).
        tasks: Names of lm-eval's tasks, task files (.yaml) or folders of them; in one string
            between commas. Perplexity is then only measured with a text or an original.
        limit: At most so many items of a task.
        shots: Examples before each item (the task's).
        batch: Sequences of tasks at once (8).
        dtype: The type that the model computes in.
        device: "auto", "cpu", "cuda" or "cuda:N".
        on_progress: Gets lines about what is done.

    Returns:
        The figures; `.record()` is what `--json` prints.

    Raises:
        DataError: The text or the tasks cannot be used, or arguments exclude each other.
        CheckpointError: A folder is not sound.
        SourceError: A dense model cannot be read.
        RunError: A model does not fit the memory, or an argument is out of its range.
    """
    if tasks is None and (limit, shots, batch) != (None, None, None):
        raise DataError("--limit, --shots and --batch are for --tasks; give it as well")
    on_text = tasks is None or text is not None or original is not None
    if not on_text and (context, windows) != (None, None):
        raise DataError(
            "--context and --windows are for text; --tasks alone reads none: add --text"
        )
    if original is not None and str(original) == name_of(model):
        raise DataError(
            f"--kl {original} is the model itself; give the original that it was made of"
        )
    at_least(2, context=context)
    at_least(1, windows=windows, limit=limit, batch=batch)
    at_least(0, shots=shots)

    from pvrt.api.opening import Opener
    from pvrt.tools.evaluation import Evaluation
    from pvrt.tools.held_out import HeldOut
    from pvrt.tools.tasks import Harness, split_tasks

    tell = on_progress or silent
    opener = Opener.of(device, dtype, tell)
    file = None if text is None else Path(text)
    held_out = HeldOut.read(file, context, CONTEXT, windows) if on_text else None
    names = split_tasks(tasks) if isinstance(tasks, str) else tasks
    harness = None if names is None else Harness(names)
    side = opener.any(model)
    found = Evaluation(side.name)
    if held_out is not None and original is not None:
        found = _against(side, opener.original(original), held_out, tell)
    else:  # KL leaves of a model its head alone; perplexity and tasks need one load
        side = replace(side, load=cache(side.load))
        if held_out is not None:
            found = _perplexity(side, held_out, tell)
    if harness is not None:
        scores = harness.run(side.load(None), side.tokenizer, limit, shots, batch or BATCH)
        found = replace(found, tasks=scores)
    return found


def _perplexity(side: "Side", text: "HeldOut", tell: Tell) -> "Evaluation":
    from pvrt.tools.evaluation import Evaluation
    from pvrt.tools.perplexity import perplexity

    tokens = text.windows(side.tokenizer, side.longest, tell)
    progress = passes(tell)("window")
    return Evaluation(side.name, perplexity(side.load(None), tokens, text.name, progress))


def _against(side: "Side", original: "Side", text: "HeldOut", tell: Tell) -> "Evaluation":
    """Perplexity and KL; the two models are in memory one after the other."""
    from pvrt.tools.compare import Probe, compare, shared_windows
    from pvrt.tools.evaluation import Against, Evaluation
    from pvrt.tools.perplexity import Perplexity

    tokens = shared_windows(text, original, [side], tell)
    original, side = (replace(each, speed=lambda: None) for each in (original, side))
    found = compare(original, [side], Probe(tokens, text.name), passes(tell))
    (figures,) = found.models
    assert figures.kl is not None
    return Evaluation(
        side.name,
        Perplexity(figures.perplexity, found.context, found.windows, text.name),
        Against(original.name, found.original.perplexity, figures.kl, found.noise_floor),
    )
