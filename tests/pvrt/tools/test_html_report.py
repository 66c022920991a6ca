"""The report: one file that needs nothing else, and text of anybody in it that stays text."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pvrt.format.grid import open_folder
from pvrt.tools.compare import Answer, Comparison, Figures, Parting, Question
from pvrt.tools.compare_text import as_text
from pvrt.tools.divergence import Divergence, Mean
from pvrt.tools.html_report import as_html
from pvrt.tools.sizes import Curves, Sizes, TensorSize
from pvrt.tools.svg import Series, line_plot
from tests.fixtures.toy import toy_model, write_toy

EVIL = '</span><script>alert("x")</script>&amp;'


def divergence(scale: float) -> Divergence:
    by_position = [scale / (1 + place) for place in range(100)]
    return Divergence(scale, scale / 9, scale, 3 * scale, 5 * scale, 0.6, by_position)


def tensors(blocks: int) -> list[TensorSize]:
    layers = [
        TensorSize(f"model.layers.{block}.mlp.experts.{expert}.up_proj", 4096, 2 + expert, True)
        for block in range(blocks)
        for expert in range(2)
    ]
    norm = TensorSize("model.norm.weight", 8, 16, False)
    return [TensorSize("model.embed_tokens.weight", 8192, 16, False), *layers, norm]


def figures(name: str, kl: float | None) -> Figures:
    curves = Curves([(0, 0.5), (20, 0.3)], [(20, 0.4)], [(0.1, 0.05), (0.2, 0.15)])
    return Figures(
        name,
        None if kl is None else "2x8g8",
        Sizes(60_000, 30_000, tensors(3)),
        16.0,
        21.5,
        Mean(3.07, 0.01),
        None if kl is None else divergence(kl),
        None if kl is None else 120.5,
        None if kl is None else curves,
    )


def comparison(*models: Figures, text: str = "a text") -> Comparison:
    parting = Parting(2, EVIL, " the", 0.25)
    answers = [Answer("Paris is ", EVIL, 12, parting) for _ in models]
    question = Question(EVIL, Answer("Paris is " + EVIL, "", 12, None), answers)
    return Comparison(
        text, 8, 101, figures("original", None), divergence(1e-5), [*models], [question]
    )


class Page(HTMLParser):
    """Tags in order; fails on one that is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_report_is_whole_and_needs_nothing_from_elsewhere(count: int) -> None:
    models = [figures(f"out/{number}", 0.1 * number + 0.1) for number in range(count)]
    html = as_html(comparison(*models), "foot")
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import|\son\w+=|\ssrc=", html)
    plots = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(plots) == 1 + count * (3 + 2)  # positions; per model three kinds and two curves
    for plot in plots:
        ElementTree.fromstring(plot)
    assert "nan" not in html.lower().replace("name", "")


def test_text_of_others_stays_text() -> None:
    html = as_html(comparison(figures(EVIL, 0.3), text=EVIL), EVIL)
    assert "<script" not in html
    assert Page(html).text.count(EVIL) >= 7  # title, text, name, prompt, answers, tokens, foot


def test_experts_of_a_block_share_a_cell_and_small_tensors_a_line() -> None:
    html = as_html(comparison(figures("out", 0.3)), "")
    assert html.count("<title>mlp.experts.up_proj ") == 3
    assert "mlp.experts.up_proj 2: 2.5 bits" in html
    assert "norms and other small tensors" in html


def test_a_model_without_run_or_tensors_or_questions_has_a_report() -> None:
    bare = replace(figures("out", 0.0), curves=None, sizes=Sizes(1, 1, []), tokens_per_second=None)
    found = replace(comparison(bare), questions=[])
    Page(as_html(found, ""))
    assert "out" in as_text(found)


@pytest.mark.parametrize(
    "points",
    [
        [(0, 0)],
        [(1, 5.0)],
        [(0, 0.0), (1, 0.0)],
        [(0, 1e-9), (5, 3.0)],
        [(2, 1.0), (2, 2.0)],
        [(0, math.inf), (1, 2.0)],
        [(0, math.nan), (1, math.nan)],
    ],
)
def test_plots_of_little_have_places_within_the_picture(points: list[tuple[float, float]]) -> None:
    plot = ElementTree.fromstring(line_plot([Series("a", points, 1)], "x", "y"))
    width, height = (float(part) for part in plot.attrib["viewBox"].split()[2:])
    for circle in plot.iter("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= width
        assert 0 <= float(circle.attrib["cy"]) <= height


def test_the_text_says_where_answers_part() -> None:
    text = as_text(comparison(figures("out", 0.3)))
    assert "parts after 2 tokens: ' the' for" in text and "KL there 0.250" in text
    assert "0.3000 +- 0.0333" in text


def test_sizes_add_up_to_the_file(tmp_path: Path) -> None:
    write_toy(tmp_path, "llama")
    stored = open_folder(tmp_path)
    sizes = Sizes.of(stored)
    bits = sum(each.weights * each.bits_per_weight for each in sizes.tensors)
    assert 0.95 * sizes.file_bytes < bits / 8 < sizes.file_bytes  # headers are the rest
    assert sizes.weights == sum(p.numel() for p in toy_model("llama").parameters())
    assert sizes.bits_per_weight == pytest.approx(stored.file_bits_per_weight())
    blocks = [each.name for each in sizes.tensors if ".layers." in each.name]
    assert blocks == sorted(blocks)


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "{",
        '{"pv": 3, "blocks": {}}',
        '{"blocks": [null, {"output_error": {"before_finetune": true, "after": 1e99}}]}',
        '{"pv": {"curves": [{"step": "1", "held_out_kl": 2}, 4]}}',
    ],
)
def test_curves_that_are_none_are_left_out(tmp_path: Path, manifest: str) -> None:
    write_toy(tmp_path, "llama")
    (tmp_path / "pvrt.json").write_text(manifest)
    assert Curves.of(open_folder(tmp_path)) is None


def test_curves_come_from_the_manifest(tmp_path: Path) -> None:
    write_toy(tmp_path, "llama")
    rows = [{"step": 0, "held_out_kl": 0.5}, {"step": 5, "held_out_kl": 0.4, "train_kl": 0.6}]
    blocks = [{"output_error": {"before_finetune": 0.2, "after": 0.1}}, {"output_error": {}}]
    (tmp_path / "pvrt.json").write_text(json.dumps({"pv": {"curves": rows}, "blocks": blocks}))
    found = Curves.of(open_folder(tmp_path))
    assert found == Curves([(0, 0.5), (5, 0.4)], [(5, 0.6)], [(0.2, 0.1)])
