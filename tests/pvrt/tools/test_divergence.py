"""KL from kept hidden states: what whole logits in float64 give, for heads of every kind."""

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from pvrt.errors import DataError, SourceError
from pvrt.tools import divergence
from pvrt.tools.divergence import Divergence, diverge, first_difference
from pvrt.tools.recording import Recording, record
from tests.fixtures.toy import _COMMON, random_model, toy_model

#: Heads that do more than multiply: a cap on logits, a scale, a divisor.
HEADS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 2.0, "tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "granite": {"logits_scaling": 3.0, "tie_word_embeddings": False},
}
PROMPTS = [[72, 101, 108], [256, 33]]


def model(kind: str, seed: int) -> Any:
    if kind not in HEADS:
        return toy_model(kind, seed)
    return random_model(AutoConfig.for_model(kind, **{**_COMMON, **HEADS[kind]}), seed)


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))


def log_probabilities(dense: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(dense(ids, use_cache=False).logits.double(), -1)


@pytest.mark.parametrize("kind", [*HEADS, "llama", "llama-tied", "gemma3_text", "phi3", "mixtral"])
def test_figures_are_those_of_whole_logits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "CHUNK_BYTES", 7 * 4 * 384)  # chunks that do not divide
    ids, pair = tokens(), (model(kind, 0), model(kind, 1))
    wanted, given = (log_probabilities(each, ids)[:, :-1] for each in pair)
    figures = diverge(*(record(each, ids) for each in pair))
    kl = (wanted.exp() * (wanted - given)).sum(-1)
    loss = [-part.gather(2, ids[:, 1:, None])[..., 0] for part in (wanted, given)]
    torch.testing.assert_close(figures.kl, kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(figures.original_loss, loss[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(figures.loss, loss[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(figures.same, wanted.argmax(-1) == given.argmax(-1))


def test_the_summary_counts_every_token() -> None:
    figures = diverge(
        record(toy_model("llama", 0), tokens()), record(toy_model("llama", 1), tokens())
    )
    summary, kl = Divergence.of(figures), figures.kl.flatten()
    assert summary.mean == pytest.approx(float(kl.mean()))
    assert summary.standard_error == pytest.approx(float(kl.std()) / math.sqrt(kl.numel()))
    assert summary.median <= summary.percentile_99 <= summary.largest == float(kl.max())
    assert len(summary.by_position) == 19
    assert sum(summary.by_position) / 19 == pytest.approx(summary.mean)


def test_a_model_does_not_differ_from_itself() -> None:
    figures = diverge(*(record(toy_model("qwen2"), tokens()) for _ in range(2)))
    assert not figures.kl.any() and bool(figures.same.all())


def test_bfloat16_is_a_small_distance_away() -> None:
    pair = toy_model("llama"), toy_model("llama").to(torch.bfloat16)
    floor = Divergence.of(diverge(*(record(each, tokens()) for each in pair)))
    other = Divergence.of(diverge(*(record(toy_model("llama", seed), tokens()) for seed in (0, 1))))
    assert 0 < floor.mean < other.mean / 100


def test_what_both_models_exclude_counts_nothing() -> None:
    wanted = torch.tensor([[0.5, 0.5, 0.0]]).log()
    given = torch.tensor([[0.25, 0.75, 0.0]]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(divergence._kl(wanted, given)) == pytest.approx(expected)


def recorded(seed: int, new_tokens: int = 12) -> Recording:
    return record(toy_model("llama", seed), tokens(), PROMPTS, new_tokens)


def test_continuations_are_greedy_and_end_with_the_end_token() -> None:
    dense = toy_model("llama", 3)
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            expected = dense.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                eos_token_id=[],
            )[0, len(prompt) :].tolist()  # fmt: skip
            dense.generation_config.eos_token_id = [expected[4], 257]
            stop = expected.index(expected[4]) + 1
            found = record(toy_model_like(dense), tokens(), [prompt], 12).continuations[0]
            assert found.tokens == expected[:stop]


def toy_model_like(dense: Any) -> Any:
    copy = toy_model("llama", 3)
    copy.generation_config.eos_token_id = dense.generation_config.eos_token_id
    return copy


def test_the_first_difference_has_the_kl_of_that_very_choice() -> None:
    original, other = recorded(0), recorded(1)
    for number, prompt in enumerate(PROMPTS):
        found = first_difference(original, other, number)
        assert found is not None  # of two random models
        ours, theirs = original.continuations[number].tokens, other.continuations[number].tokens
        assert ours[: found.place] == theirs[: found.place]
        assert (ours[found.place], theirs[found.place]) == (found.original_token, found.token)
        read = torch.tensor([[*prompt, *ours[: found.place]]])
        wanted, given = (log_probabilities(toy_model("llama", s), read)[0, -1] for s in (0, 1))
        kl = float((wanted.exp() * (wanted - given)).sum())
        assert found.kl == pytest.approx(kl, rel=1e-3)


def test_one_answer_that_is_the_beginning_of_another_is_no_difference() -> None:
    assert first_difference(recorded(0), recorded(0, 5), 0) is None


def test_another_vocabulary_is_refused() -> None:
    config = AutoConfig.for_model("llama", **{**_COMMON, "vocab_size": 400})
    with pytest.raises(DataError, match="vocabulary of 384 tokens and the other model one of 400"):
        diverge(record(toy_model("llama"), tokens()), record(random_model(config), tokens()))


def test_logits_that_are_not_numbers_are_said_to_be_so() -> None:
    broken = toy_model("llama")
    with torch.no_grad():
        broken.get_output_embeddings().weight[7] = math.nan
    with pytest.raises(SourceError, match="LlamaForCausalLM gives logits that are not numbers in"):
        record(broken, tokens())


def test_logits_that_do_not_follow_from_hidden_states_are_refused() -> None:
    odd, whole = toy_model("llama"), type(toy_model("llama")).forward

    def forward(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        output = whole(self, input_ids=input_ids, **options)
        output.logits = output.logits + torch.nn.functional.one_hot(input_ids, 384)
        return output

    odd.__class__ = type("Odd", (type(odd),), {"forward": forward})
    with pytest.raises(SourceError, match="Odd computes its logits in a way"):
        record(odd, tokens())
