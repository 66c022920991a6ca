"""A comparison as one HTML file: inline SVG, light and dark, no scripts, nothing from elsewhere.

Names, prompts and answers are anybody's text: all of it is escaped.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from pvrt.tools.compare import Answer, Comparison, Figures, Question, short
from pvrt.tools.sizes import Curves, Sizes, TensorSize
from pvrt.tools.svg import Series, colour, heat_strip, line_plot

_BINS = 48  # of the positions in a window
_SMALL = 0.002  # of all weights: a kind of tensors with fewer has no line of its own


def as_html(found: Comparison, foot: str) -> str:
    """The report, with a line at its foot."""
    models = found.models
    title = (
        f"{' and '.join(short(each.name) for each in models)} beside {short(found.original.name)}"
    )
    sections = [
        f"<h1>{escape(title)}</h1>",
        _introduction(found),
        _figures(found),
        _positions(found),
        *(_sizes(figures, number) for number, figures in enumerate(models, 1)),
        *(_curves(figures, number) for number, figures in enumerate(models, 1)),
        _questions(found),
        f"<footer>{escape(foot)}</footer>",
    ]
    page = Template((Path(__file__).parent / "report_page.html").read_text(encoding="utf-8"))
    return page.substitute(title=escape(title), body="\n".join(filter(None, sections)))


def _introduction(found: Comparison) -> str:
    return (
        f'<p class="muted">Measured on {found.windows} windows of {found.context} tokens of '
        f"{escape(found.text)}. KL compares the distributions of the next token, original against "
        "model, in nats: 0 is no difference.</p>"
    )


def _figures(found: Comparison) -> str:
    head = (
        "<tr><th></th><th>file</th><th>bits per weight</th><th>perplexity</th>"
        "<th>KL to the original</th><th>same likeliest token</th><th>tokens per second</th></tr>"
    )
    rows = [_row(figures, number) for number, figures in enumerate([found.original, *found.models])]
    floor = found.noise_floor
    return (
        f'{_table(head, rows)}<p class="muted">Noise floor: KL {floor.mean:.6f} ± '
        f"{floor.standard_error:.6f}, the original in bfloat16 against itself in float32. A "
        "smaller KL than that means nothing. ± is the standard error over tokens.</p>"
    )


def _table(head: str, rows: Sequence[str]) -> str:
    body = "".join(rows)
    return f'<div class="card"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _row(figures: Figures, number: int) -> str:
    kl, speed = figures.kl, figures.tokens_per_second
    kind = "the original" if kl is None else figures.scheme or "dense"
    name = short(figures.name) if kl is None else figures.name  # its place is a long path
    cells = [
        f"{_key(number)}{escape(name)}<small>{escape(kind)}</small>",
        f"{figures.sizes.file_bytes / 1e6:.1f} MB",
        f"{figures.bits_per_weight:.2f}",
        f"{figures.perplexity:.2f}",
        "" if kl is None else f"{kl.mean:.4f}<small>± {kl.standard_error:.4f}</small>",
        "" if kl is None else f"{kl.same_top:.1%}",
        "–" if speed is None else f"{speed:.1f}",
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _positions(found: Comparison) -> str:
    series = [
        Series(figures.name, _binned(figures.kl.by_position), number)
        for number, figures in enumerate(found.models, 1)
        if figures.kl is not None
    ]
    floor = Series("noise floor", _binned(found.noise_floor.by_position), 0)
    # A line at the bottom would only press the others together.
    if max(y for _, y in floor.points) > min(y for each in series for _, y in each.points) / 20:
        series.append(floor)
    return "<h2>KL by position in the text</h2>" + _figure(
        f"Mean over windows{_steps(found.context - 1)}: what a longer context does to the error.",
        series,
        "tokens of the text before",
        "KL to the original, nats per token",
    )


def _steps(positions: int) -> str:
    width = -(-positions // _BINS)
    return "" if width == 1 else f" and {width} neighbouring positions"


def _binned(values: Sequence[float]) -> list[tuple[float, float]]:
    """(middle of the positions, mean of the values) in at most _BINS bins; what rounding makes
    negative is 0.
    """
    width = -(-len(values) // _BINS)
    starts = range(0, len(values), width)
    bins = ((start, values[start : start + width]) for start in starts)
    return [(start + (len(b) + 1) / 2, max(sum(b) / len(b), 0.0)) for start, b in bins]


def _legend(series: Sequence[Series]) -> str:
    keys = (f"<span>{_key(each.colour)}{escape(each.name)}</span>" for each in series)
    return f'<div class="legend">{"".join(keys)}</div>'


def _key(number: int) -> str:
    """A model's or curve's mark: a square of its colour, for what is quiet a dashed line."""
    if number == 0:
        return '<span class="key quiet"></span>'
    return f'<span class="key" style="background: {colour(number)}"></span>'


@dataclass(frozen=True)
class _Kind:
    """Tensors that differ in their block (and expert) alone, by block."""

    name: str
    tensors: list[TensorSize]

    @property
    def weights(self) -> int:
        return sum(each.weights for each in self.tensors)

    @property
    def bits(self) -> float:
        """Bits of all of them."""
        return sum(each.weights * each.bits_per_weight for each in self.tensors)

    def by_block(self) -> Iterator[tuple[str, float]]:
        """(name, bits per weight) per block, the mean over its experts."""
        blocks: dict[str, list[TensorSize]] = {}
        for each in self.tensors:
            number = re.search(r"\d+", each.name)
            blocks.setdefault(number[0] if number else "", []).append(each)
        for block, tensors in blocks.items():
            kind = _Kind(self.name, tensors)
            yield f"{self.name} {block}".rstrip(), kind.bits / kind.weights


def _kinds(sizes: Sizes) -> list[_Kind]:
    """Kinds of tensors, the one with most bits first; small ones together, last."""
    found: dict[str, list[TensorSize]] = {}
    for each in sizes.tensors:
        name = re.sub(r"^.*?\.?\d+\.", "", each.name)
        name = re.sub(r"\.\d+\.", ".", name).removesuffix(".weight").removeprefix("model.")
        found.setdefault(name, []).append(each)
    kinds = [_Kind(name, tensors) for name, tensors in found.items()]
    large = [kind for kind in kinds if kind.weights >= _SMALL * sizes.weights]
    small = [each for kind in kinds if kind not in large for each in kind.tensors]
    large.sort(key=lambda kind: -kind.bits)
    return [*large, _Kind("norms and other small tensors", small)] if small else large


def _sizes(figures: Figures, number: int) -> str:
    kinds = _kinds(figures.sizes)
    if not kinds:
        return ""
    every = [bits for kind in kinds for _, bits in kind.by_block()]
    total = sum(kind.bits for kind in kinds)
    rows = []
    for kind in kinds:
        strip = heat_strip(list(kind.by_block()), min(1.0, *every), max(16.0, *every))
        share = kind.bits / total
        rows.append(
            f'<tr><td>{escape(kind.name)}</td><td class="strip">{strip}</td>'
            f"<td>{kind.bits / kind.weights:.2f}</td><td>{kind.bits / 8e6:.1f} MB</td>"
            f'<td class="share">{share:.1%}<i style="width: {share:.1%}; background: '
            f'{colour(number)}"></i></td></tr>'
        )
    head = (
        '<tr><th>tensor</th><th class="strip">bits per weight, from the first block to the last'
        "</th><th>mean</th><th>size</th><th>share</th></tr>"
    )
    return (
        f"<h2>Bits per tensor: {escape(short(figures.name))}</h2>"
        "<figure><figcaption>A cell is one block's tensor; the stronger its colour, the more bits "
        "(hover for the number). Codebooks, scales and zeros count.</figcaption>"
        f"{_table(head, rows)}</figure>"
    )


def _curves(figures: Figures, number: int) -> str:
    curves = figures.curves
    if curves is None:
        return ""
    plots = [*_training(curves, number), *_blocks(curves, number)]
    return f"<h2>The run that made {escape(short(figures.name))}</h2>{''.join(plots)}"


def _training(curves: Curves, number: int) -> Iterator[str]:
    if len(curves.held_out) < 2:
        return
    series = [Series("held-out text", curves.held_out, number)]
    if curves.training:
        series.append(Series("training text", curves.training, 0))
    yield _figure(
        "PV-Tuning: KL to the original by step",
        series,
        "step",
        "KL to the original, nats per token",
    )


def _blocks(curves: Curves, number: int) -> Iterator[str]:
    if not curves.blocks:
        return
    before, after = zip(*curves.blocks, strict=True)
    series = [
        Series("after fine-tuning", list(enumerate(after, 1)), number),
        Series("before", list(enumerate(before, 1)), 0),
    ]
    caption = "Calibration: relative error of every block's output on the calibration text"
    yield _figure(caption, series, "block", "relative error")


def _figure(caption: str, series: Sequence[Series], x_label: str, y_label: str) -> str:
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption>"
        f'<div class="card">{_legend(series)}{line_plot(series, x_label, y_label)}</div></figure>'
    )


def _questions(found: Comparison) -> str:
    if not found.questions:
        return ""
    names = [found.original.name, *(figures.name for figures in found.models)]
    return (
        '<h2>Greedy answers</h2><p class="muted">Marked is what is no longer the original\'s.</p>'
        + "".join(_question(each, names) for each in found.questions)
    )


def _question(question: Question, names: Sequence[str]) -> str:
    answers = [question.original, *question.answers]
    cards = (
        _answer(answer, name, number)
        for number, (answer, name) in enumerate(zip(answers, names, strict=True))
    )
    return f'<h3>{escape(question.prompt.strip())}</h3><div class="answers">{"".join(cards)}</div>'


def _answer(answer: Answer, name: str, number: int) -> str:
    parting = answer.parting
    if number == 0:
        where, same = f"the original, {answer.tokens} tokens", ""
    elif parting is None:
        where, same = f"as the original, {answer.tokens} tokens", "same"
    else:
        where, same = (
            f"parts after {parting.after_tokens} tokens: “{parting.token}” for "
            f"“{parting.original_token}”, KL there {parting.kl:.3f}",
            "same",
        )
    rest = f'<span class="rest">{escape(answer.rest)}</span>' if answer.rest else ""
    return (
        f'<div class="card" style="--tone: {colour(number)}"><b>{escape(short(name))}</b>'
        f'<small>{escape(where)}</small><div class="said"><span class="{same}">'
        f"{escape(answer.same)}</span>{rest}</div></div>"
    )
