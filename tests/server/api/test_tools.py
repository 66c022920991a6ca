"""Tool calls: the forms that models write them in, and what clients get."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from pvrt_server.api.tool_stream import CallDelta, ToolStream
from pvrt_server.api.tools import HERMES, LLAMA3, Function, Tools, tool_form
from pvrt_server.engine.engine import Engine
from pvrt_server.errors import RequestError
from tests.server.running import Server, scripted_engine, serving

FUNCTIONS = (
    Function("weather", {"type": "object", "properties": {"city": {"type": "string"}}}, False),
    Function("time", {"type": "object"}, False),
)
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 8}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "time"}},
]
LONG: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "minLength": 90}},
            "required": ["city"],
        },
    },
}
HERMES_TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}"
    "{{ tool.function.name }}: {{ tool.function.description }} {% endfor %}"
    "Write <tool_call> around calls.<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }}"
    "{{ call.function.arguments.city }}</tool_call>{% endfor %}<|end|>{% endfor %}<|assistant|>"
)
HELLO: Any = [{"role": "user", "content": "Hello"}]
TWO_CALLS = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "K}<\\"ln", "x": [1]}}'
    '\n</tool_call>\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)


def taken_apart(
    text: str, size: int, form: Any = HERMES, most: int | None = None
) -> tuple[str, list[list[str]]]:
    stream = ToolStream(Tools(form, FUNCTIONS, must_call=False, most_calls=most))
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    parts = [part for piece in pieces for part in stream.push(piece)] + list(stream.flush())
    calls: list[list[str]] = []
    for part in parts:
        if isinstance(part, CallDelta) and part.name is not None:
            assert part.number == len(calls)
            calls.append([part.name, ""])
        elif isinstance(part, CallDelta):
            calls[part.number][1] += part.arguments
    return "".join(part for part in parts if isinstance(part, str)), calls


HERMES_CASES: list[tuple[str, str, list[list[str]]]] = [
    (
        TWO_CALLS,
        "Let me see.",
        [["weather", '{"city": "K}<\\"ln", "x": [1]}'], ["time", "{}"]],
    ),
    ("plain <tool text < ok \n", "plain <tool text < ok \n", []),
    ("<tool_call>\nno JSON\n</tool_call>", "<tool_call>\nno JSON\n</tool_call>", []),
    (
        '<tool_call>[{"name": "a", "arguments": {"b":1}}, {"name": "c", "arguments": 7}]'
        "</tool_call> done",
        " done",
        [["a", '{"b":1}'], ["c", "7"]],
    ),
    (
        '<tool_call>{"name": "a", "arguments": "{\\"b\\": 1}"}</tool_call>',
        "",
        [["a", '{"b": 1}']],
    ),
    ('<tool_call>\n{"name": "a", "arg', '<tool_call>\n{"name": "a", "arg', []),
    ('<tool_call>\n{"name": "a", "arguments": {"b": [1', "", [["a", '{"b": [1']]),
]
LLAMA_CASES: list[tuple[str, str, list[list[str]]]] = [
    (
        '{"name": "weather", "parameters": {"b": "}"}}; {"name": "time", "parameters": {}}',
        "",
        [["weather", '{"b": "}"}'], ["time", "{}"]],
    ),
    ('{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
    ('{"answer": 1}', '{"answer": 1}', []),
    ("Hello {", "Hello {", []),
]


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(("text", "content", "calls"), HERMES_CASES)
def test_calls_in_hermes_form(text: str, content: str, calls: list[list[str]], size: int) -> None:
    assert taken_apart(text, size) == (content, calls)


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(("text", "content", "calls"), LLAMA_CASES)
def test_calls_in_llama_form(text: str, content: str, calls: list[list[str]], size: int) -> None:
    assert taken_apart(text, size, LLAMA3) == (content, calls)


def test_one_call_at_most_drops_the_others() -> None:
    content, calls = taken_apart(TWO_CALLS, 3, most=1)
    assert content == "Let me see."
    assert [name for name, _ in calls] == ["weather"]


def test_arguments_arrive_as_they_are_written() -> None:
    stream = ToolStream(Tools(HERMES, FUNCTIONS, must_call=False, most_calls=None))
    list(stream.push('<tool_call>\n{"name": "time", "arguments": {"a'))
    assert list(stream.push('": "long')) == [CallDelta(0, None, '": "long')]


def test_the_template_shows_the_form_of_calls() -> None:
    assert tool_form(HERMES_TEMPLATE) is HERMES
    assert tool_form('{% if tools %}{"name": function name, "parameters": ...}') is LLAMA3
    with pytest.raises(RequestError, match="knows no tools"):
        tool_form("{{ messages }}")
    with pytest.raises(RequestError, match="does not read"):
        tool_form("{% if tools %}<tool_call><function=example>")


def with_tools(engine: Engine) -> Engine:
    engine.codec.tokenizer.chat_template = HERMES_TEMPLATE
    return engine


@pytest.fixture(scope="module")
def calls(toy: Path) -> Iterator[Server]:
    """A server that answers everything with two calls."""
    engine, _ = scripted_engine(toy, TWO_CALLS)
    with serving(with_tools(engine)) as running:
        yield running


@pytest.fixture(scope="module")
def random(toy: Path) -> Iterator[Server]:
    """The toy model: random text, unless a grammar says otherwise."""
    with serving(with_tools(Engine.load(toy))) as running:
        yield running


def test_the_official_client_reads_calls(calls: Server) -> None:
    answer = calls.client().chat.completions.create(model="toy", messages=HELLO, tools=TOOLS)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.tool_calls is not None
    names = [call.function.name for call in choice.message.tool_calls if call.type == "function"]
    assert names == ["weather", "time"]
    ids = {call.id for call in choice.message.tool_calls}
    assert len(ids) == 2
    assert all(id.startswith("call_") for id in ids)


def test_streamed_calls_join_to_the_same(calls: Server) -> None:
    with calls.client().chat.completions.stream(model="toy", messages=HELLO, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.delta") > 10
    (choice,) = final.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.tool_calls is not None
    arguments = [json.loads(call.function.arguments) for call in choice.message.tool_calls]
    assert arguments == [{"city": 'K}<"ln', "x": [1]}, {}]


def test_no_tools_are_called_when_the_choice_is_none(calls: Server) -> None:
    answer = calls.client().chat.completions.create(
        model="toy", messages=HELLO, tools=TOOLS, tool_choice="none"
    )
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content == TWO_CALLS


def test_tools_and_earlier_calls_reach_the_template(calls: Server) -> None:
    messages: Any = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Kiel"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    body = {"messages": messages, "tools": TOOLS}
    tokens = calls.post("/tokenize", body).json()["tokens"]
    text = calls.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert "The weather in a city." in text
    assert text.endswith("<tool_call>weatherKiel</tool_call><|tool|>rain")
    response = calls.post("/v1/chat/completions", {"messages": messages, "tools": TOOLS})
    assert response.json()["usage"]["prompt_tokens"] == len(tokens)


@pytest.mark.parametrize(
    ("arguments", "city"),
    [
        ('{"city": "Kiel"}', "Kiel"),
        ({"city": "Kiel"}, "Kiel"),
        ('{"city": "Ki', "Ki"),
        ('{"city', ""),
        *((text, "") for text in ("", None, "null", "[1]", "Paris", "{}")),
    ],
)
def test_calls_come_back_however_they_were_cut(calls: Server, arguments: Any, city: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "go", "arguments": arguments}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    tokens = calls.post("/tokenize", {"messages": messages, "tools": TOOLS}).json()["tokens"]
    text = calls.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert text.endswith(f"<tool_call>go{city}</tool_call>")


def test_a_call_that_this_server_cut_can_be_sent_back(random: Server) -> None:
    client = random.client()
    options: Any = {"model": "toy", "tools": [LONG], "tool_choice": "required", "max_tokens": 60}
    cut = client.chat.completions.create(messages=HELLO, **options).choices[0]
    assert cut.finish_reason == "length"
    assert cut.message.tool_calls
    answer = {"role": "tool", "tool_call_id": cut.message.tool_calls[0].id, "content": "bad"}
    messages: Any = [*HELLO, cut.message, answer]
    assert client.chat.completions.create(messages=messages, **options).choices


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_come_comes_and_fits_its_schema(
    random: Server, choice: Any, stream: bool
) -> None:
    client = random.client()
    options: Any = {
        "model": "toy",
        "messages": HELLO,
        "tools": TOOLS[:1],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "seed": 3,
        "max_tokens": 200,
    }
    if stream:
        with client.chat.completions.stream(**options) as events:
            answer: Any = events.get_final_completion()
    else:
        answer = client.chat.completions.create(**options)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert arguments.keys() == {"city"}
    assert len(arguments["city"]) <= 8


def test_strict_tools_bind_the_calls_of_free_answers(toy: Path) -> None:
    """The script calls with a field that the schema forbids; strict makes that impossible."""
    strict = json.loads(json.dumps(TOOLS[:1]))
    strict[0]["function"]["strict"] = True
    engine, _ = scripted_engine(toy, TWO_CALLS)
    with serving(with_tools(engine)) as server:
        answer = server.client().chat.completions.create(
            model="toy", messages=HELLO, tools=strict, max_tokens=300
        )
    choice = answer.choices[0]
    assert (choice.message.content or "").startswith("Let me see.")
    assert choice.message.tool_calls
    for call in choice.message.tool_calls:
        assert call.type == "function"
        if choice.finish_reason == "tool_calls":
            assert json.loads(call.function.arguments).keys() == {"city"}
    first = choice.message.tool_calls[0]
    assert first.type == "function" and '"x"' not in first.function.arguments


def test_a_model_without_tools_refuses_them(says: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="knows no tools") as caught:
        says.client().chat.completions.create(model="toy", messages=HELLO, tools=TOOLS)
    assert caught.value.param == "tools"


class Person(pydantic.BaseModel):
    age: Literal[7]


class Size(pydantic.BaseModel):
    age: Literal["big"]


class Greet(pydantic.BaseModel):
    who: Person


def with_person(name: str, model: type[pydantic.BaseModel], place: str = "$defs") -> Any:
    """A tool whose parameters hold a schema called Person at a place of their own."""
    parameters = {
        "type": "object",
        "properties": {"who": {"$ref": f"#/{place}/Person"}},
        "required": ["who"],
        place: {"Person": model.model_json_schema()},
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TREE: Any = {
    "type": "function",
    "function": {
        "name": "tree",
        "parameters": {
            "type": "object",
            "properties": {"who": {"anyOf": [{"const": 7}, {"$ref": "#"}]}},
            "required": ["who"],
        },
    },
}
GREET, SIZE = with_person("greet", Person), with_person("size", Size)


@pytest.mark.parametrize(
    ("tools", "choice"),
    [
        ([GREET], "required"),
        ([GREET, SIZE], "required"),
        ([GREET, SIZE], {"type": "function", "function": {"name": "size"}}),
        ([with_person("greet", Person, "definitions")], "required"),
        ([TREE], "required"),
        ([openai.pydantic_function_tool(Greet, name="greet")], "required"),
    ],
)
def test_references_inside_of_parameters_lead_to_their_own_schema(
    random: Server, tools: Any, choice: Any
) -> None:
    answer = random.client().chat.completions.create(
        model="toy",
        messages=HELLO,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=200,
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    who = json.loads(call.function.arguments)["who"]
    while call.function.name == "tree" and isinstance(who, dict):
        who = who["who"]
    assert who == {"greet": {"age": 7}, "size": {"age": "big"}, "tree": 7}[call.function.name]


def test_references_hold_beside_strict_and_beside_a_form_for_answers(random: Server) -> None:
    client = random.client()
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "greet", "schema": Greet.model_json_schema()},
    }
    strict = json.loads(json.dumps(GREET))
    strict["function"]["strict"] = True
    for tools, more in (([strict], {}), ([GREET, SIZE], {"response_format": form})):
        options: Any = {"max_tokens": 60, **more}
        answer = client.chat.completions.create(model="toy", messages=HELLO, tools=tools, **options)
        if more and answer.choices[0].message.content:
            Greet.model_validate_json(answer.choices[0].message.content)


def test_a_schema_that_cannot_be_is_blamed_on_its_tool(random: Server) -> None:
    wrong = json.loads(json.dumps(SIZE))
    wrong["function"]["parameters"]["$defs"] = {}
    with pytest.raises(openai.BadRequestError, match=r"'size'.*/Person") as caught:
        random.client().chat.completions.create(
            model="toy", messages=HELLO, tools=[GREET, wrong], tool_choice="required"
        )
    assert caught.value.param == "tools"
    assert "greet" not in caught.value.message
    assert "guidance" not in caught.value.message


def test_only_allowed_tools_are_called(random: Server) -> None:
    def allow(*names: str) -> Any:
        functions = [{"type": "function", "function": {"name": name}} for name in names]
        return {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": functions},
        }

    options: Any = {"model": "toy", "messages": HELLO, "tools": [GREET, SIZE], "max_tokens": 200}
    create = random.client().chat.completions.create
    answer = create(**options, tool_choice=allow("size"), parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "size"
    with pytest.raises(openai.BadRequestError, match="not among the tools"):
        create(**options, tool_choice=allow("other"))


LLAMA3_TEMPLATE = (
    '{% if tools %}{"name": function name, "parameters": ...}{% endif %}'
    "{% for message in messages %}{% if message.tool_calls %}"
    "{% if not message.tool_calls|length == 1 %}{{ raise_exception('one call') }}{% endif %}"
    "{% endif %}{{ message.content }}{% endfor %}"
)


def test_a_template_that_takes_one_call_a_turn_gets_one(toy: Path) -> None:
    engine = Engine.load(toy)
    engine.codec.tokenizer.chat_template = LLAMA3_TEMPLATE
    with serving(engine) as server:
        options: Any = {"model": "toy", "messages": HELLO, "tools": [GREET, SIZE]}
        answer = server.client().chat.completions.create(
            **options, tool_choice="required", max_tokens=300
        )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert len(answer.choices[0].message.tool_calls or []) == 1
