"""Schemas of tools, and which may be called: what must come fits, errors name the tool."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from pvrt_server.engine.engine import Engine
from tests.server.api.test_tools import HELLO, with_tools
from tests.server.running import Server, serving


@pytest.fixture(scope="module")
def random(toy: Path) -> Iterator[Server]:
    """The toy model: random text, unless a grammar says otherwise."""
    with serving(with_tools(Engine.load(toy))) as running:
        yield running


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
