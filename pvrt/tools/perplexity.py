"""Perplexity on fixed windows of held-out text."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pvrt.errors import DataError, RunError


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean next-token loss over windows, with the context length it was taken at."""

    value: float
    context: int
    windows: int
    text: str


def default_text() -> str:
    """Python's language reference as the standard library ships it: text that every machine has."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_utf8(path: Path) -> str:
    """A text file as it stands, without the mark of UTF-8 that some begin with. Raises DataError
    when it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def read_text(path: Path) -> str:
    """A UTF-8 text file. WikiText files (.raw) are joined by blank lines, as the usual protocol
    does. Raises DataError when unreadable.
    """
    text = read_utf8(path)
    if path.suffix != ".raw":
        return text
    rows = text.split("\n")
    rows = rows[:-1] if rows and rows[-1] == "" else rows
    return "\n\n".join(f"{row}\n" if row.strip() else "" for row in rows)


def windows(text: str, tokenizer: Any, context: int, limit: int | None = None) -> Tensor:
    """Non-overlapping windows [n, context] of a text's tokens, the last partial one dropped.

    A tokenizer that begins sequences with special tokens begins every window with them.
    Raises DataError when the text has less than one window.
    """
    start = beginning(tokenizer)
    fresh = context - len(start)
    ids: list[int] = []
    if limit is not None:  # a few windows of a long text need not wait for all its tokens
        ids = _plain(text[: _CHARACTERS * limit * fresh], tokenizer)
    if limit is None or len(ids) <= limit * fresh + _CUT:
        ids = _plain(text, tokenizer)
    count = len(ids) // fresh
    if count == 0:
        raise DataError(
            f"the text has {len(ids)} tokens, one window needs {fresh}; give more text or a "
            "smaller --context"
        )
    count = min(count, limit or count)
    body = torch.tensor(ids[: count * fresh]).view(count, fresh)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, -1), body], 1)


#: Characters that are read per token wanted, and tokens that a cut in the text may have changed.
_CHARACTERS, _CUT = 12, 16


def _plain(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def beginning(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text, without those that it puts after."""
    plain = _plain("a", tokenizer)
    whole: list[int] = tokenizer("a", verbose=False)["input_ids"]
    places = range(len(whole) - len(plain) + 1)
    return whole[: next(n for n in places if whole[n : n + len(plain)] == plain)]


#: Of a loss: exp of more is beyond a float.
_LARGEST = 700.0


def check_known(tokens: Tensor, config: Any) -> None:
    """Raise DataError for tokens that the model of a transformers config has no row for."""
    known, last = int(config.get_text_config().vocab_size), int(tokens.max())
    if last >= known:
        raise DataError(
            f"the text has token {last}, and the model knows {known} tokens: its tokenizer belongs "
            "to another model, or has tokens that the model was never given"
        )


def perplexity(
    model: Any,
    tokens: Tensor,
    text: str = "",
    progress: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Perplexity of a causal language model over windows [n, context].

    Every window is scored alone, all its tokens but the first, in float32 losses. `text` names the
    source in the result; `progress(done, total, perplexity so far)` is called after every window.
    Raises RunError for a window whose loss is not finite, or too large for any perplexity, and
    DataError for tokens that the model does not know.
    """
    check_known(tokens, model.config)
    total = 0.0
    with torch.inference_mode():
        for number, window in enumerate(tokens, 1):
            ids = window.unsqueeze(0).to(model.device)
            logits = model(ids, use_cache=False).logits[0, :-1]
            loss = float(F.cross_entropy(logits.float(), ids[0, 1:]))
            if not loss < _LARGEST:
                raise RunError(
                    f"the loss of window {number} is {loss}: the model's weights are damaged, or "
                    f"its numbers are too large for {model.dtype}"
                )
            total += loss
            if progress is not None:
                progress(number, len(tokens), math.exp(total / number))
    count, context = tokens.shape
    return Perplexity(math.exp(total / count), context, count, text)
