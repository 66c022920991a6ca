"""POST /v1/completions with the official client."""

import json
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoTokenizer

import pvrt
from pvrt_server.engine.text import TextCodec
from pvrt_server.errors import RequestError
from tests.server.running import Server

PROMPT = "Once upon a time"


def transformers_answer(toy: Path, number: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(toy)
    model = pvrt.load(toy, dense=True)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=number, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


def test_greedy_text_is_that_of_transformers(client: openai.OpenAI, toy: Path) -> None:
    answer = client.completions.create(model="toy", prompt=PROMPT, temperature=0, max_tokens=40)
    expected = transformers_answer(toy, 40)
    assert answer.choices[0].text.rstrip("�") == expected.rstrip("�")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == 40
    assert answer.usage.total_tokens == len(PROMPT) + 40


def test_a_stream_joins_to_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="toy", prompt=PROMPT, temperature=0, max_tokens=40)
    chunks = list(
        client.completions.create(
            model="toy", prompt=PROMPT, temperature=0, max_tokens=40, stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_nulls_mean_defaults_as_langchain_sends_them(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="toy",
        prompt=["x"],
        logprobs=None,
        seed=None,
        stop=None,
        best_of=None,
        logit_bias=None,
        n=1,
        top_p=1,
        frequency_penalty=0,
        presence_penalty=0,
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 16  # OpenAI's default


def test_the_whole_body_has_every_field_of_the_specification(server: Server) -> None:
    body = server.post("/v1/completions", {"model": "toy", "prompt": "a", "max_tokens": 2}).json()
    assert {"id", "object", "created", "model", "choices", "usage"} <= body.keys()
    assert body["object"] == "text_completion"
    assert body["choices"][0].keys() == {"index", "text", "logprobs", "finish_reason"}
    assert body["choices"][0]["logprobs"] is None


def test_prompts_of_all_kinds_give_the_same_answers(client: openai.OpenAI) -> None:
    ids = client.post("/../tokenize", body={"prompt": PROMPT}, cast_to=httpx.Response).json()
    tokens = ids["tokens"]
    texts = []
    for prompt in (PROMPT, [PROMPT, PROMPT], tokens, [tokens, tokens]):
        answer = client.completions.create(model="toy", prompt=prompt, temperature=0)
        texts += [choice.text for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    assert len(texts) == 6
    assert len(set(texts)) == 1


def test_a_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        answer = client.completions.create(
            model="toy", prompt=PROMPT, seed=seed, n=3, temperature=1, max_tokens=12
        )
        return [choice.text for choice in answer.choices]

    assert texts(7) == texts(7)
    assert texts(7) != texts(8)
    assert len(set(texts(7))) == 3


def test_greedy_choices_are_all_the_same(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="toy", prompt=PROMPT, n=2, temperature=0)
    assert answer.choices[0].text == answer.choices[1].text


def test_n_multiplies_answers_but_not_the_prompt(client: openai.OpenAI) -> None:
    chunks = client.completions.create(
        model="toy",
        prompt=["ab", "abc"],
        n=2,
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    *parts, last = list(chunks)
    assert {part.choices[0].index for part in parts} == {0, 1, 2, 3}
    assert all(part.usage is None for part in parts)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens == 5
    assert last.usage.completion_tokens == 12


@pytest.mark.parametrize("stop", ["three", ["nothing", "o three"], ["wo th"]])
def test_stop_strings_end_the_text_before_them(says: Server, stop: str | list[str]) -> None:
    client = says.client()
    expected = "one two " if stop == "three" else "one tw" if "o three" in stop else "one t"
    answer = client.completions.create(model="toy", prompt="ab", max_tokens=99, stop=stop)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(
        client.completions.create(model="toy", prompt="ab", max_tokens=99, stop=stop, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_an_emoji_of_four_tokens_arrives_whole(says: Server) -> None:
    chunks = says.client().completions.create(model="toy", prompt="ab", max_tokens=99, stream=True)
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert "😀" in pieces
    assert "".join(pieces) == "one two three 😀 four"


def test_max_tokens_inside_an_emoji_does_not_send_half_of_it(says: Server) -> None:
    answer = says.client().completions.create(model="toy", prompt="ab", max_tokens=16)
    assert answer.choices[0].text == "one two three "
    assert answer.choices[0].finish_reason == "length"


def test_legacy_logprobs_have_their_shape(says: Server) -> None:
    answer = says.client().completions.create(model="toy", prompt="ab", max_tokens=3, logprobs=2)
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.tokens == ["o", "n", "e"]
    assert scores.text_offset == [0, 1, 2]
    assert scores.token_logprobs is not None
    assert all(value is not None and value > -0.01 for value in scores.token_logprobs)
    assert scores.top_logprobs is not None
    assert all(len(top) == 2 for top in scores.top_logprobs)


def test_parts_of_characters_are_told_apart_in_logprobs(says: Server) -> None:
    answer = says.client().completions.create(model="toy", prompt="ab", max_tokens=20, logprobs=0)
    scores = answer.choices[0].logprobs
    assert scores is not None and scores.tokens is not None
    assert scores.tokens[14:18] == [
        "bytes:\\xf0",
        "bytes:\\x9f",
        "bytes:\\x98",
        "bytes:\\x80",
    ]
    assert scores.text_offset == [*range(15), 14, 14, 14, 15, 16]


def test_echo_with_scores_serves_lm_eval(client: openai.OpenAI, toy: Path) -> None:
    """lm-eval sends token ids, echo, max_tokens 1 and logprobs 1; it reads scores of the prompt."""
    tokens = AutoTokenizer.from_pretrained(toy)(PROMPT).input_ids
    answer = client.completions.create(
        model="toy", prompt=[tokens], echo=True, max_tokens=1, logprobs=1, temperature=0, seed=1234
    )
    assert answer.choices[0].text.startswith(PROMPT)
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.token_logprobs is not None and scores.top_logprobs is not None
    assert scores.text_offset == list(range(len(PROMPT) + 1))
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    model = pvrt.load(toy, dense=True)
    expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1).detach()
    for place, value in enumerate(scores.token_logprobs[1:-1]):
        assert value == pytest.approx(float(expected[place, tokens[place + 1]]), abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_without_generating_scores_the_prompt(server: Server, stream: bool) -> None:
    body = {"prompt": "abc", "echo": True, "max_tokens": 0, "logprobs": 0, "stream": stream}
    response = server.post("/v1/completions", body)
    assert response.status_code == 200
    text = response.text
    if stream:
        text = text.split("\n\n")[0].removeprefix("data: ")
    choice = json.loads(text)["choices"][0]
    assert choice["text"] == "abc"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]


def test_ignore_eos_and_penalties_of_vllms_bench_are_honoured(says: Server) -> None:
    answer = says.client().completions.create(
        model="toy",
        prompt="ab",
        max_tokens=30,
        extra_body={"ignore_eos": True, "repetition_penalty": 1.0},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 30


def test_a_suffix_asks_for_the_middle_where_the_model_has_tokens_for_it(toy: Path) -> None:
    codec = TextCodec(AutoTokenizer.from_pretrained(toy))
    with pytest.raises(RequestError, match="suffix"):
        codec.encode_gap("a", "b")
    marks = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
    codec.tokenizer.add_tokens(marks)
    first, second, last = codec.tokenizer.convert_tokens_to_ids(marks)
    a, b = codec.encode("a"), codec.encode("b")
    assert codec.encode_gap("a", "b") == [first, *a, second, *b, last]
