"""POST /v1/chat/completions with the official client."""

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

from pvrt_server.api.requests import Conversation
from pvrt_server.engine.text import TextCodec
from tests.server.running import Server

HELLO: Any = [{"role": "user", "content": "Hello"}]


def test_the_prompt_is_the_models_template(client: openai.OpenAI, toy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy)
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
        },
        {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "How are you?", "name": "ann"},
    ]
    answer = client.chat.completions.create(
        model="toy", messages=messages, temperature=0, max_tokens=20
    )
    text = (
        "<|system|>Be brief.<|end|><|user|>Hel\nlo<|end|><|assistant|>Hi<|end|>"
        "<|user|>How are you?<|end|><|assistant|>"
    )
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    same = client.completions.create(model="toy", prompt=prompt, temperature=0, max_tokens=20)
    assert answer.choices[0].message.content == same.choices[0].text
    assert answer.choices[0].message.role == "assistant"


def test_a_stream_opens_with_the_role_and_joins_to_the_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="toy", messages=HELLO, temperature=0, max_completion_tokens=30
    )
    chunks = list(
        client.chat.completions.create(
            model="toy", messages=HELLO, temperature=0, max_completion_tokens=30, stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason is None for chunk in chunks[:-1]] == [True] * (
        len(chunks) - 1
    )
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_usage_comes_in_a_chunk_of_its_own_and_only_when_asked(says: Server) -> None:
    client = says.client()
    chunks = list(
        client.chat.completions.create(
            model="toy", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24  # 23 bytes and the end
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    silent = client.chat.completions.create(model="toy", messages=HELLO, stream=True)
    assert all(chunk.choices and chunk.usage is None for chunk in silent)


def test_the_stream_is_framed_as_server_sent_events(says: Server) -> None:
    response = says.post("/v1/chat/completions", {"messages": HELLO, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") and "\n" not in event for event in events[:-2])
    assert response.text.isascii()


def test_the_whole_body_has_every_field_of_the_specification(says: Server) -> None:
    body = says.post("/v1/chat/completions", {"messages": HELLO}).json()
    assert {"id", "object", "created", "model", "choices", "usage"} <= body.keys()
    (choice,) = body["choices"]
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"] == {
        "role": "assistant",
        "content": "one two three 😀 four",
        "refusal": None,
    }
    assert choice["logprobs"] is None
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("top", [None, 0, 3])
def test_logprobs_list_each_token_with_its_bytes(says: Server, top: int | None) -> None:
    options: Any = {} if top is None else {"top_logprobs": top}
    answer = says.client().chat.completions.create(
        model="toy", messages=HELLO, max_tokens=18, logprobs=True, **options
    )
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content
    assert entries is not None
    raw = b"".join(bytes(entry.bytes or []) for entry in entries)
    assert raw.decode() == answer.choices[0].message.content == "one two three 😀"
    assert all(len(entry.top_logprobs) == (top or 0) for entry in entries)
    assert all(-0.01 < entry.logprob <= 0 for entry in entries)


def test_streamed_logprobs_miss_no_token(says: Server) -> None:
    chunks = says.client().chat.completions.create(
        model="toy", messages=HELLO, logprobs=True, stream=True, stop="four"
    )
    entries = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert b"".join(bytes(entry.bytes or []) for entry in entries).decode().endswith("four")


def test_the_asynchronous_client_gets_answers_at_once(says: Server) -> None:
    async def ask() -> list[str | None]:
        client = openai.AsyncOpenAI(base_url=f"{says.url}/v1", api_key="none", max_retries=0)
        async with client:
            asked = [
                client.chat.completions.create(model="toy", messages=HELLO, max_tokens=n)
                for n in (3, 7, 13)
            ]
            answers = await asyncio.gather(*asked)
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(ask()) == ["one", "one two", "one two three"]


def test_an_answer_without_a_limit_may_fill_the_context(server: Server) -> None:
    messages = [{"role": "user", "content": "long " * 95}]
    body = {"messages": messages, "ignore_eos": True, "temperature": 0}
    usage = server.post("/v1/chat/completions", body).json()["usage"]
    assert usage["total_tokens"] == 512


def test_template_variables_reach_the_template(server: Server) -> None:
    body = {"messages": HELLO, "add_generation_prompt": False}
    plain = server.post("/tokenize", {"messages": HELLO}).json()
    shorter = server.post("/tokenize", body).json()
    assert plain["count"] == shorter["count"] + 1
    assert plain["max_model_len"] == 512
    named = server.post("/tokenize", {"prompt": "é", "return_token_strs": True}).json()
    assert named["count"] == 2 == len(named["token_strs"])


def test_the_last_message_can_be_continued(server: Server) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Once upon"}]
    body = {"messages": messages, "continue_final_message": True, "temperature": 0}
    asked = {"messages": messages, "continue_final_message": True}
    tokens = server.post("/tokenize", asked).json()
    text = server.post("/detokenize", {"tokens": tokens["tokens"]}).json()["prompt"]
    assert text.endswith("Once upon")
    answer = server.post("/v1/chat/completions", {**body, "max_tokens": 8}).json()
    same = {"prompt": tokens["tokens"], "temperature": 0, "max_tokens": 8}
    text = server.post("/v1/completions", same).json()["choices"][0]["text"]
    assert answer["choices"][0]["message"]["content"] == text


def test_continuous_usage_is_in_every_chunk(says: Server) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        says.client().chat.completions.create(
            model="toy", messages=HELLO, stream=True, stream_options=options
        )
    )
    counts = [chunk.usage.completion_tokens if chunk.usage else -1 for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] >= 0 and counts[-1] == 24


THINKS = (
    "{% for message in messages %}{{ message.content }}<|end|>{% endfor %}"
    "{% if enable_thinking is false %}off{% endif %}{{ reasoning_effort }}"
)


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({}, ""),
        ({"reasoning_effort": "high"}, "high"),
        ({"reasoning_effort": "none"}, "offnone"),
        ({"thinking": {"type": "disabled"}}, "off"),
        ({"thinking": {"type": "enabled"}}, ""),
    ],
)
def test_settings_of_reasoning_reach_a_template_that_knows_them(
    toy: Path, options: dict[str, Any], end: str
) -> None:
    codec = TextCodec(AutoTokenizer.from_pretrained(toy))
    codec.tokenizer.chat_template = THINKS
    conversation = Conversation.model_validate({"messages": HELLO, **options})
    assert codec.decode(conversation.encode(codec)) == f"Hello{end}"


def test_answers_end_where_the_template_ends_a_turn(toy: Path) -> None:
    codec = TextCodec(AutoTokenizer.from_pretrained(toy))
    tokenizer = codec.tokenizer
    assert codec.end_of_turn == tokenizer.eos_token_id
    codec = TextCodec(tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<s>\n{% endfor %}"
    )
    assert codec.end_of_turn == tokenizer.bos_token_id
    codec = TextCodec(tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    assert codec.end_of_turn is None
