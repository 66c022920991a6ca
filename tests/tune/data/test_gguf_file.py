"""GGUF files: whole ones are read, others are refused by what they lack, by tune and plan alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pvrt.errors import SourceError
from pvrt_tune.data.source_model import load_skeleton, load_source
from tests.fixtures.gguf_model import ROWS, write_gguf
from tests.fixtures.progress_bars import counted_bars

OPENERS = (load_source, load_skeleton)


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    with counted_bars() as bars:
        source = load_source(str(write_gguf(tmp_path / "a.gguf")))
    assert not source.notes and not bars
    assert source.model.config.vocab_size == ROWS
    with torch.inference_mode():
        logits = source.dense(torch.float32)(torch.arange(8)[None]).logits
    assert bool(torch.isfinite(logits).all()) and float(logits.std()) > 0.01


def test_a_head_that_is_not_stored_is_the_embedding(tmp_path: Path) -> None:
    source = load_source(str(write_gguf(tmp_path / "a.gguf", without=["output"])))
    assert source.model.config.tie_word_embeddings


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize(
    "name", ["output_norm", "token_embd", "blk.1.attn_q", "blk.0.ffn_norm", "blk.1.ffn_down"]
)
def test_a_missing_tensor_is_named(tmp_path: Path, opener: Callable[[str], Any], name: str) -> None:
    file = write_gguf(tmp_path / "a.gguf", without=[name])
    with pytest.raises(SourceError, match=rf"a\.gguf holds no {name}\.weight, which its model"):
        opener(str(file))


@pytest.mark.parametrize("opener", OPENERS)
def test_a_part_of_a_model_is_refused(tmp_path: Path, opener: Callable[[str], Any]) -> None:
    file = write_gguf(tmp_path / "a-00001-of-00002.gguf", parts=2)
    with pytest.raises(SourceError, match="one of 2 parts of a model; join them"):
        opener(str(file))


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("size", [4, 40, 1000])
def test_a_file_that_is_cut_short_is_refused(
    tmp_path: Path, opener: Callable[[str], Any], size: int
) -> None:
    file = write_gguf(tmp_path / "a.gguf")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(SourceError, match=r"a\.gguf is damaged or cut short"):
        opener(str(file))


def test_what_the_model_has_no_place_for_is_told(tmp_path: Path) -> None:
    more = {"blk.2.attn_norm.weight": np.ones(64, np.float32)}
    (note,) = load_source(str(write_gguf(tmp_path / "a.gguf", more=more))).notes
    assert note.endswith("left out: blk.2.attn_norm.weight")


def test_opening_parses_the_header_once_for_all_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    parsed: list[str] = []
    parse = gguf.GGUFReader.__init__

    def counted(self: gguf.GGUFReader, path: Path) -> None:
        parsed.append(str(path))
        parse(self, path)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    for number, file in enumerate(("a.gguf", "b.gguf"), 1):  # what is left of one is not taken
        load_source(str(write_gguf(tmp_path / file)))
        # Whether it is whole; the model without weights; tokenizer, config and weights.
        assert len(parsed) == 3 * number
        assert Path(parsed[-1]).name == file
    assert isinstance(gguf.GGUFReader, type)
