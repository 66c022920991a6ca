"""POST /v1/responses with the official client: what is streamed is what is answered and kept."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

from pvrt_server.api import response_requests
from pvrt_server.api.response_requests import ResponseStore, Stored
from pvrt_server.engine.engine import Engine
from tests.server.api.test_reasoning import OPENS
from tests.server.api.test_tools import HERMES_TEMPLATE, TOOLS, TWO_CALLS
from tests.server.running import Server, scripted_engine, serving

ANSWER = "one two three 😀 four"
WEATHER: Any = {"type": "function", **TOOLS[0]["function"]}


def serve_script(toy: Path, text: str, template: str) -> Iterator[Server]:
    engine, _ = scripted_engine(toy, text)
    engine.codec.tokenizer.chat_template = template
    with serving(engine) as running:
        yield running


@pytest.fixture(scope="module")
def calls(toy: Path) -> Iterator[Server]:
    yield from serve_script(toy, TWO_CALLS, HERMES_TEMPLATE)


@pytest.fixture(scope="module")
def thinker(toy: Path) -> Iterator[Server]:
    yield from serve_script(toy, "I weigh it.\n</think>\n\nYes.", OPENS)


@pytest.fixture(scope="module")
def random(toy: Path) -> Iterator[Server]:
    with serving(Engine.load(toy)) as running:
        running.engine.codec.tokenizer.chat_template = HERMES_TEMPLATE
        yield running


def prompt_tokens(server: Server, *messages: tuple[str, str]) -> int:
    said = [{"role": role, "content": content} for role, content in messages]
    count: int = server.post("/tokenize", {"messages": said}).json()["count"]
    return count


def test_a_text_is_answered(says: Server) -> None:
    answer = says.client().responses.create(
        model="toy", input="Hello", instructions="Be brief.", metadata={"a": "b"}, user="ann"
    )
    assert answer.output_text == ANSWER
    assert answer.status == "completed"
    assert answer.instructions == "Be brief."
    assert answer.usage is not None
    assert answer.usage.output_tokens == 24
    asked = prompt_tokens(says, ("system", "Be brief."), ("user", "Hello"))
    assert answer.usage.input_tokens == asked


@pytest.mark.parametrize("name", ["says", "calls", "thinker"])
def test_the_events_of_a_stream_make_up_the_response(
    name: str, request: pytest.FixtureRequest
) -> None:
    server: Server = request.getfixturevalue(name)
    options: Any = {"tools": [WEATHER]} if name == "calls" else {}
    with server.client().responses.stream(model="toy", input="Hello", **options) as stream:
        events = list(stream)
        final: Any = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    grown: dict[str, str] = {}
    done: dict[str, Any] = {}
    for event in events:
        said: Any = event
        if event.type.endswith(".delta"):
            grown[said.item_id] = grown.get(said.item_id, "") + said.delta
        elif event.type == "response.output_item.done":
            assert said.output_index == len(done)
            done[said.item.id] = said.item
    assert list(done) == [item.id for item in final.output]
    whole = server.client().responses.create(model="toy", input="Hello", **options)
    texts: list[list[str]] = [[], []]
    for place, response in enumerate((final, whole)):
        for item in response.output:
            text = item.arguments if item.type == "function_call" else item.content[0].text
            texts[place].append(f"{item.type} {text}")
            assert item.status == "completed"
            assert place or text == grown[item.id]
    assert texts[0] == texts[1]
    assert {
        "says": [f"message {ANSWER}"],
        "calls": [
            "message Let me see.",
            'function_call {"city": "K}<\\"ln", "x": [1]}',
            "function_call {}",
        ],
        "thinker": ["reasoning I weigh it.", "message Yes."],
    }[name] == texts[0]


def test_a_conversation_goes_on_from_what_was_stored(says: Server) -> None:
    client = says.client()
    first = client.responses.create(model="toy", input="Hello", instructions="Be brief.")
    second = client.responses.create(
        model="toy", input="Again", previous_response_id=first.id, instructions="Be long."
    )
    by_hand = client.responses.create(
        model="toy",
        input=[
            {"role": "user", "content": "Hello"},
            {"type": "item_reference", "id": first.output[0].id or ""},
            {"role": "user", "content": [{"type": "input_text", "text": "Again"}]},
        ],
        instructions="Be long.",
        store=False,
    )
    turns = (("user", "Hello"), ("assistant", ANSWER), ("user", "Again"))
    asked = prompt_tokens(says, ("system", "Be long."), *turns)
    assert [r.usage and r.usage.input_tokens for r in (second, by_hand)] == [asked, asked]
    assert client.responses.retrieve(second.id).output_text == ANSWER
    (item,) = client.responses.input_items.list(second.id).data
    assert item.type == "message"
    assert [part.to_dict()["text"] for part in item.content] == ["Again"]
    client.responses.delete(first.id)
    for lost in (first, by_hand):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(lost.id)
        with pytest.raises(openai.BadRequestError, match="there is no response") as caught:
            client.responses.create(model="toy", input="x", previous_response_id=lost.id)
        assert caught.value.code == "previous_response_not_found"


def test_calls_and_their_results_go_back(calls: Server) -> None:
    client = calls.client()
    first = client.responses.create(model="toy", input="Hello", tools=[WEATHER])
    called = [item for item in first.output if item.type == "function_call"]
    results: Any = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        for call in called
    ]
    second = client.responses.create(
        model="toy", input=results, previous_response_id=first.id, tools=[WEATHER]
    )
    messages = [
        {"role": "user", "content": "Hello"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [
                {"function": {"name": call.name, "arguments": call.arguments}} for call in called
            ],
        },
        *({"role": "tool", "content": "rain"} for _ in called),
    ]
    tools = [{"type": "function", "function": {k: WEATHER[k] for k in WEATHER if k != "type"}}]
    asked = calls.post("/tokenize", {"messages": messages, "tools": tools}).json()["count"]
    assert second.usage is not None
    assert second.usage.input_tokens == asked


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "weather"},
        {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "weather"}],
        },
    ],
)
def test_a_call_that_must_come_comes(random: Server, choice: Any) -> None:
    answer = random.client().responses.create(
        model="toy",
        input="Hello",
        tools=[WEATHER, {"type": "function", "name": "x", "parameters": {}, "strict": False}],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_output_tokens=200,
    )
    item = answer.output[-1]
    assert item.type == "function_call"
    if choice != "required":
        assert item.name == "weather"
        assert json.loads(item.arguments).keys() == {"city"}


class Pet(pydantic.BaseModel):
    kind: str = pydantic.Field(max_length=5)
    age: int = pydantic.Field(le=9, ge=0)


def test_answers_follow_a_schema(random: Server) -> None:
    answer = random.client().responses.parse(model="toy", input="A pet?", text_format=Pet)
    assert isinstance(answer.output_parsed, Pet)


def test_a_cut_answer_says_so(says: Server) -> None:
    answer = says.client().responses.create(model="toy", input="Hello", max_output_tokens=3)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output_text == "one"


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"input": [{"type": "computer_call"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": "long " * 200}, "input"),
        ({"input": 7}, "input"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temprature": 3}, "temprature"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "tools": 5}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "tools": None}}, "tool_choice"),
        ({"text": {"format": 5}}, "response_format"),
        ({"text": {"format": [1]}}, "response_format"),
        ({"input": [{"type": "reasoning", "content": 5}]}, "input"),
        ({"input": [{"type": "reasoning", "content": [5]}]}, "input"),
    ],
)
def test_a_request_is_refused_by_the_name_of_its_field(
    says: Server, extra: dict[str, Any], param: str
) -> None:
    response = says.post("/v1/responses", {"model": "toy", "input": "Hello", **extra})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_an_answer_that_breaks_says_so_in_its_stream(toy: Path) -> None:
    engine, _ = scripted_engine(toy, [1, 2, MemoryError("no memory")])
    with serving(engine) as server:
        events = list(server.client().responses.create(model="toy", input="Hi", stream=True))
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert "no memory" in last.response.error.message


def test_the_store_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_requests, "MOST_RESPONSES", 3)
    monkeypatch.setattr(response_requests, "MOST_BYTES", 1000)
    store = ResponseStore()
    for name in "abcd":
        store.add(Stored({"id": name, "output": []}, [], []))
    assert [name for name in "abcd" if store.get(name)] == ["b", "c", "d"]
    store.add(Stored({"id": "e", "output": ["x" * 950]}, [], []))
    assert [name for name in "abcde" if store.get(name)] == ["e"]
    store.remove("e")
    store.add(Stored({"id": "f", "output": ["x" * 900]}, [], []))
    assert store.get("f")
