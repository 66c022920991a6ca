"""vLLM with our plugin and the embedded engine give the same answers over the same protocol."""

from typing import Any, Literal

import openai
import pydantic
import pytest

from pvrt_server.self_test import Target, run_checks
from tests.server.running import PATIENCE, Server

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
