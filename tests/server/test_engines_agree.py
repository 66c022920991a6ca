"""vLLM with our plugin and the embedded engine give the same answers over the same protocol."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from pvrt_server.engine.engine import Engine
from pvrt_server.engine.loading import load_codec
from pvrt_server.self_test import Target, run_checks
from tests.fixtures.toy import write_toy
from tests.server.running import PATIENCE, Server, serving, vllm_serving

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
PROMPTS = ["Once upon a time", "def main():", "0, 1, 1, 2, 3, 5,", "x"]


@pytest.fixture(scope="module")
def vllm(vllm_server: Target) -> openai.OpenAI:
    """The official client of vLLM."""
    return openai.OpenAI(
        base_url=f"{vllm_server.url}/v1",
        api_key=vllm_server.api_key,
        max_retries=0,
        timeout=5 * PATIENCE,
    )


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_completions_agree(vllm: openai.OpenAI, client: openai.OpenAI, prompt: str) -> None:
    def answer(who: openai.OpenAI) -> Any:
        return who.completions.create(
            model="toy", prompt=prompt, temperature=0, max_tokens=48, logprobs=0
        )

    ours, theirs = answer(client), answer(vllm)
    assert ours.choices[0].text == theirs.choices[0].text
    assert ours.choices[0].finish_reason == theirs.choices[0].finish_reason
    assert ours.usage.total_tokens == theirs.usage.total_tokens
    scores, expected = (a.choices[0].logprobs.token_logprobs for a in (ours, theirs))
    assert scores == pytest.approx(expected, abs=1e-3)


def test_greedy_chats_agree(vllm: openai.OpenAI, client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Answer."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Who"}, {"type": "text", "text": "?"}],
        },
    ]

    def answer(who: openai.OpenAI, **options: Any) -> Any:
        return who.chat.completions.create(
            model="toy", messages=messages, temperature=0, max_tokens=48, **options
        )

    ours, theirs = answer(client), answer(vllm)
    assert ours.choices[0].message.content == theirs.choices[0].message.content
    assert ours.usage.prompt_tokens == theirs.usage.prompt_tokens
    texts = [
        "".join(chunk.choices[0].delta.content or "" for chunk in answer(who, stream=True))
        for who in (client, vllm)
    ]
    assert texts[0] == texts[1] == ours.choices[0].message.content


def test_stop_strings_and_echoed_scores_agree(
    vllm: openai.OpenAI, client: openai.OpenAI, server: Server
) -> None:
    text = client.completions.create(model="toy", prompt="x", temperature=0, max_tokens=48)
    stop = text.choices[0].text[4:6]

    def answer(who: openai.OpenAI) -> Any:
        return who.completions.create(
            model="toy", prompt="x y z", temperature=0, max_tokens=48, stop=stop
        )

    assert answer(client).choices[0].text == answer(vllm).choices[0].text

    def scores(who: openai.OpenAI) -> Any:
        answer = who.completions.create(
            model="toy", prompt="lm-eval", temperature=0, max_tokens=1, echo=True, logprobs=1
        )
        return answer.choices[0].logprobs

    ours, theirs = scores(client), scores(vllm)
    assert ours.tokens[:7] == theirs.tokens[:7]
    assert ours.token_logprobs[1:] == pytest.approx(theirs.token_logprobs[1:], abs=1e-3)
    assert ours.text_offset[:7] == theirs.text_offset[:7]


def test_vllm_passes_every_check_of_ours(vllm_server: Target) -> None:
    failed = {r.name: r.problem for r in run_checks(vllm_server) if r.problem is not None}
    assert failed == {}


class Form(pydantic.BaseModel):
    """What grammars do not know, beside what they do."""

    place: str = pydantic.Field(max_length=5, json_schema_extra={"format": "path"})
    kinds: set[Literal["a", "b"]] = pydantic.Field(max_length=2)


def test_schemas_of_pydantic_are_followed_on_both(
    vllm: openai.OpenAI, client: openai.OpenAI
) -> None:
    for who in (vllm, client):
        answer = who.chat.completions.create(
            model="toy",
            messages=[{"role": "user", "content": "Hello"}],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "form", "schema": Form.model_json_schema()},
            },
            max_tokens=200,
            seed=1,
        )
        Form.model_validate_json(answer.choices[0].message.content or "")


def test_conversations_go_on_on_both(vllm: openai.OpenAI, client: openai.OpenAI) -> None:
    for who in (vllm, client):
        create = who.responses.create
        first = create(model="toy", input="Hello", max_output_tokens=16)
        second = create(
            model="toy", input="And?", previous_response_id=first.id, max_output_tokens=16
        )
        assert first.usage is not None and second.usage is not None
        assert second.usage.input_tokens > first.usage.input_tokens


MARKS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.fixture(scope="module")
def code_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy checkpoint with tokens for gaps, and 512 tokens of context scaled as cards say."""
    folder = tmp_path_factory.mktemp("code") / "toy"
    write_toy(folder, "qwen3")
    codec = load_codec(folder)
    codec.tokenizer.add_tokens(MARKS)
    codec.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {**YARN, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def both(code_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Where the embedded engine and vLLM serve it, without any flag about its context."""
    log = tmp_path_factory.mktemp("vllm") / "log"
    with (
        serving(Engine.load(code_model)) as ours,
        vllm_serving(code_model, log, served_model_name="toy") as theirs,
    ):
        yield [ours.url, theirs.url]


def completed(url: str, **body: Any) -> Any:
    given = {"model": "toy", "temperature": 0, "max_tokens": 32, "logprobs": 0, **body}
    answer = httpx.post(f"{url}/v1/completions", json=given, timeout=5 * PATIENCE)
    return answer.json()


def test_a_scaled_context_is_offered_and_read_alike(both: list[str]) -> None:
    prompt = [(7 * place) % 256 for place in range(1900)]
    for url in both:
        (card,) = httpx.get(f"{url}/v1/models", timeout=PATIENCE).json()["data"][:1]
        assert card["max_model_len"] == 2048
        too_long = completed(url, prompt=[1] * 2100)
        assert "2048" in too_long["error"]["message"]
    ours, theirs = (completed(url, prompt=prompt)["choices"][0] for url in both)
    assert ours["text"] == theirs["text"]
    scores, expected = (choice["logprobs"]["token_logprobs"] for choice in (ours, theirs))
    assert scores == pytest.approx(expected, abs=1e-3)


def test_a_suffix_asks_both_for_the_same_middle(both: list[str]) -> None:
    gap = {"prompt": "def f(x):\n    return ", "suffix": "\nprint(f(2))"}
    ours, theirs = (completed(url, **gap) for url in both)
    assert ours["choices"][0]["text"] == theirs["choices"][0]["text"]
    plain = {**gap, "suffix": None}
    assert completed(both[0], **plain)["choices"][0]["text"] != ours["choices"][0]["text"]
    assert ours["usage"]["prompt_tokens"] == theirs["usage"]["prompt_tokens"]
    assert (
        ours["usage"]["prompt_tokens"] > completed(both[1], **plain)["usage"]["prompt_tokens"] + 3
    )
    for url in both:
        refused = completed(url, prompt=[1, 2], suffix="b")["error"]
        assert refused["param"] == "suffix"
