from collections import Counter
from typing import Any

import pytest
import torch

from pvrt_server.engine.sampling import Sampler, SamplingParams, score
from pvrt_server.errors import RequestError

CPU = torch.device("cpu")
LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])


def draws(params: SamplingParams, number: int = 400, logits: torch.Tensor = LOGITS) -> Counter[int]:
    sampler = Sampler(params, [0], len(logits), CPU)
    return Counter(sampler.choose(logits) for _ in range(number))


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draws(SamplingParams(temperature=0), 5) == {1: 5}


def test_temperature_one_draws_from_the_distribution() -> None:
    number = 4000
    found = draws(SamplingParams(seed=0), number)
    for token, expected in enumerate(LOGITS.softmax(0).tolist()):
        assert found[token] / number == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_k": -1}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.0}, {1}),
        ({"top_p": 0.7}, {1, 2}),
        ({"top_p": 0.7, "top_k": 1}, {1}),
        ({"min_p": 0.3}, {1, 2}),
        ({"min_p": 1.0}, {1}),
        ({"temperature": 1e-6}, {1}),
        ({"logit_bias": {4: 100.0}}, {4}),
        ({"logit_bias": {1: -100.0}, "temperature": 0.0}, {2}),
    ],
)
def test_options_narrow_the_choice_to(options: dict[str, Any], tokens: set[int]) -> None:
    assert set(draws(SamplingParams(seed=1, **options), 2000)) == tokens


def test_a_seed_repeats_and_another_differs() -> None:
    def drawn(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed), [0], 200, CPU)
        return [sampler.choose(torch.zeros(200)) for _ in range(20)]

    assert drawn(-5) == drawn(-5)
    assert drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)


def test_penalties_move_logits_as_openai_and_huggingface_define_them() -> None:
    sampler = Sampler(
        SamplingParams(temperature=0, presence_penalty=0.7, frequency_penalty=0.5), [1], 5, CPU
    )
    # Token 1 (3.0) loses 1.2, then 0.5 more; token 2 (2.0) is next. The prompt does not count.
    assert [sampler.choose(LOGITS) for _ in range(3)] == [1, 2, 1]
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=2.0), [1], 5, CPU)
    assert sampler.choose(LOGITS) == 2  # 3.0 / 2 for the prompt's token
    assert sampler.choose(LOGITS) == 1


def test_scores_are_log_probabilities_with_the_likeliest_first() -> None:
    expected = LOGITS.log_softmax(0)
    (entry,) = score(LOGITS[None], torch.tensor([3]), 2)
    assert entry.token_id == 3
    assert entry.logprob == pytest.approx(float(expected[3]))
    assert [token for token, _ in entry.top] == [1, 2]
    assert entry.top[0][1] == pytest.approx(float(expected[1]))


def test_an_impossible_token_scores_a_number_that_json_has() -> None:
    logits = torch.tensor([[0.0, -torch.inf]])
    (entry,) = score(logits, torch.tensor([1]), 2)
    assert entry.logprob == entry.top[1][1] == -9999.0


def test_logits_that_are_not_numbers_are_reported() -> None:
    with pytest.raises(FloatingPointError, match="float32"):
        draws(SamplingParams(), 1, torch.tensor([1.0, torch.nan]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", -1.0),
        ("seed", 1 << 63),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("logit_bias", {1: 101.0}),
        ("stop", ("ok", "")),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
