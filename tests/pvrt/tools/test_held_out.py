"""Windows of text: what they begin with, and how long they may be."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from pvrt.errors import DataError, RunError
from pvrt.tools.held_out import HeldOut, longest_context
from pvrt.tools.perplexity import default_text, perplexity, windows
from tests.fixtures.toy import toy_model, toy_tokenizer


def around(template: str) -> Any:
    """A tokenizer that puts special tokens around a text."""
    tokenizer = toy_tokenizer()
    specials = [("<s>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=specials
    )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "start"),
    [("$A", []), ("<s> $A", [256]), ("<s> $A <|end|>", [256]), ("$A <|end|>", [])],
)
def test_windows_begin_as_texts_do_and_never_with_what_ends_one(
    template: str, start: list[int]
) -> None:
    tokenizer = around(template)
    text = "".join(chr(97 + i % 26) for i in range(100))
    found = windows(text, tokenizer, 16)
    fresh = 16 - len(start)
    assert found.shape == (100 // fresh, 16)
    assert all(row[: len(start)].tolist() == start for row in found)
    joined = found[:, len(start) :].flatten()
    assert (
        joined.tolist()
        == list(tokenizer(text, add_special_tokens=False)["input_ids"])[: len(joined)]
    )


def test_few_windows_are_the_first_of_all() -> None:
    text = default_text()[:60_000]
    assert torch.equal(
        windows(text, toy_tokenizer(), 64, 3), windows(text, toy_tokenizer(), 64)[:3]
    )


def test_a_limit_above_the_texts_windows_gives_all_of_them() -> None:
    text = "abc " * 50
    assert len(windows(text, toy_tokenizer(), 16, 1000)) == 200 // 16


def held_out(context: int | None) -> HeldOut:
    return HeldOut("a text", "some words " * 300, context, 1024, 2)


def test_what_nobody_asked_for_is_cut_with_a_sentence() -> None:
    said: list[str] = []
    assert held_out(None).windows(toy_tokenizer(), 512, said.append).shape == (2, 512)
    assert said == ["windows have 512 tokens, for the model was made for no more"]


def test_a_context_that_was_asked_for_is_refused() -> None:
    with pytest.raises(DataError, match="--context 513 is longer than the 512 tokens"):
        held_out(513).windows(toy_tokenizer(), 512, print)


@pytest.mark.parametrize("longest", [512, None])
def test_a_context_that_fits_is_taken_in_silence(longest: int | None) -> None:
    assert held_out(512).windows(toy_tokenizer(), longest, pytest.fail).shape == (2, 512)


def test_the_longest_context_is_the_configs() -> None:
    assert longest_context(toy_model("gemma3_text").config) == 512
    silent = SimpleNamespace()
    silent.get_text_config = lambda: silent
    assert longest_context(silent) is None


@pytest.mark.parametrize("logit", [float("nan"), float("inf"), 1e30])
def test_a_perplexity_that_is_no_number_is_an_error(logit: float) -> None:
    model: Any = lambda ids, use_cache: SimpleNamespace(  # noqa: E731
        logits=torch.tensor([logit, 0.0]).expand(1, ids.shape[1], 2)
    )
    model.device, model.dtype = "cpu", torch.float32
    sizes = SimpleNamespace(vocab_size=2)
    model.config = SimpleNamespace(get_text_config=lambda: sizes)
    with pytest.raises(RunError, match=r"loss of window \d is "):
        perplexity(model, torch.tensor([[0, 0], [1, 1]]))
