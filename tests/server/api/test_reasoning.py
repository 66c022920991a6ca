"""Templates with <think>: reasoning has a field of its own, and no schema binds it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pvrt_server.api.reasoning import ReasoningStream, Thought
from pvrt_server.engine.engine import Engine
from tests.server.running import Server, scripted_engine, serving

HELLO: Any = [{"role": "user", "content": "Hello"}]
#: Opens the thought itself unless it was turned off, as DeepSeek's and Qwen's do.
OPENS = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n"
    "{% if enable_thinking is false %}\n</think>\n\n{% endif %}{% endif %}"
)
#: Leaves it to the model.
ALLOWS = OPENS.replace("<|assistant|><think>\n", "<|assistant|>").replace("\n</think>", "</think>")
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "m", "schema": SCHEMA}}


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("thought", "text", "parts"),
    [
        ("inside", "I weigh it.\n</think>\n\nYes.", ("I weigh it.", "Yes.")),
        ("inside", "a </thin b", ("a </thin b", "")),
        ("inside", "\n\n</think>\n\n{}", ("", "{}")),
        ("before", "<think>\nHm.\n</think>\n\nYes </think> no", ("Hm.", "Yes </think> no")),
        ("before", "\n<think>Hm.", ("Hm.", "")),
        ("before", "<thing> it", ("", "<thing> it")),
        ("before", " Yes.", ("", " Yes.")),
        ("past", "<think>x</think>", ("", "<think>x</think>")),
    ],
)
def test_reasoning_and_answer_come_apart(
    thought: Thought, text: str, parts: tuple[str, str], size: int
) -> None:
    stream = ReasoningStream(thought)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    given = [stream.push(piece, False) for piece in pieces] + [stream.push("", True)]
    assert ("".join(each[0] for each in given), "".join(each[1] for each in given)) == parts


@pytest.mark.parametrize(
    ("template", "text"),
    [(OPENS, "I weigh it.\n</think>\n\nYes."), (ALLOWS, "<think>\nI weigh it.\n</think>\n\nYes.")],
)
def test_clients_get_both_apart(toy: Path, template: str, text: str) -> None:
    engine, _ = scripted_engine(toy, text)
    engine.codec.tokenizer.chat_template = template
    with serving(engine) as server:
        create = server.client().chat.completions.create
        message: Any = create(model="toy", messages=HELLO).choices[0].message
        deltas: list[Any] = [
            chunk.choices[0].delta for chunk in create(model="toy", messages=HELLO, stream=True)
        ]
    assert message.content == "Yes."
    assert message.reasoning_content == message.reasoning == "I weigh it."
    assert "".join(delta.content or "" for delta in deltas) == "Yes."
    assert "".join(getattr(delta, "reasoning", "") for delta in deltas) == "I weigh it."


@pytest.fixture(scope="module")
def thinker(toy: Path) -> Iterator[Server]:
    """A server of a script that thinks, over a template that opens the thought."""
    engine, _ = scripted_engine(toy, 'It is {so.\n</think>\n\n{"ok": true}')
    engine.codec.tokenizer.chat_template = OPENS
    with serving(engine) as running:
        yield running


@pytest.mark.parametrize("form", [FORM, {"type": "json_object"}])
def test_a_schema_binds_the_answer_and_not_the_thought(thinker: Server, form: Any) -> None:
    answer = thinker.client().chat.completions.create(
        model="toy", messages=HELLO, response_format=form
    )
    message: Any = answer.choices[0].message
    assert message.reasoning == "It is {so."
    assert json.loads(message.content) == {"ok": True}


def test_without_thinking_the_schema_binds_at_once(toy: Path) -> None:
    with serving(Engine.load(toy)) as server:
        server.engine.codec.tokenizer.chat_template = OPENS
        body = {"messages": HELLO, "response_format": FORM, "thinking": {"type": "disabled"}}
        message = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    assert json.loads(message["content"]).keys() == {"ok"}
    assert "reasoning" not in message
