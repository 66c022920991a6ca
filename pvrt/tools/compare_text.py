"""A comparison for a terminal."""

import textwrap
from collections.abc import Sequence

from pvrt.tools.compare import Answer, Comparison, Figures

_WIDTH = 96


def as_text(found: Comparison, questions: int | None = None) -> str:
    """Table of figures, noise floor, and the answers one below the other; of all questions, or of
    so many.
    """
    rows = [
        ("", "MB", "bits/weight", "perplexity", "KL (nats)", "same top", "tokens/s"),
        *(_row(figures) for figures in (found.original, *found.models)),
    ]
    floor = found.noise_floor
    lines = [
        *_table(rows),
        "",
        f"on {found.windows} windows of {found.context} tokens of {found.text}; KL(original || "
        "model) per token",
        f"noise floor: KL {floor.mean:.6f} +- {floor.standard_error:.6f}, the original in bfloat16 "
        "against itself in float32",
    ]
    names = [figures.name for figures in found.models]
    for question in found.questions[:questions]:
        lines += ["", f"> {question.prompt.strip()}", *_answer("original", question.original)]
        for name, answer in zip(names, question.answers, strict=True):
            lines += _answer(name, answer)
    return "\n".join(lines)


def _row(figures: Figures) -> tuple[str, ...]:
    kl, speed = figures.kl, figures.tokens_per_second
    return (
        figures.name if figures.scheme is None else f"{figures.name} ({figures.scheme})",
        f"{figures.sizes.file_bytes / 1e6:.1f}",
        f"{figures.bits_per_weight:.3f}",
        f"{figures.perplexity:.3f}",
        "" if kl is None else f"{kl.mean:.4f} +- {kl.standard_error:.4f}",
        "" if kl is None else f"{kl.same_top:.1%}",
        "" if speed is None else f"{speed:.1f}",
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def _answer(name: str, answer: Answer) -> list[str]:
    """The answer with a mark where it leaves the original's, and what happened there."""
    if answer.parting is None:
        text, where = answer.same, f"{answer.tokens} tokens"
        if name != "original":
            where += ", all as the original's"
    else:
        parting = answer.parting
        text = f"{answer.same} >>{answer.rest}"
        where = (
            f"parts after {parting.after_tokens} tokens: {parting.token!r} for "
            f"{parting.original_token!r}, KL there {parting.kl:.3f}"
        )
    wrapped = [
        piece
        for line in text.strip().split("\n")
        for piece in textwrap.wrap(line, _WIDTH, break_long_words=False) or [""]
    ]
    return [f"  {name} ({where})", *(f"    {piece}".rstrip() for piece in wrapped)]
