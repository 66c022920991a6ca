"""Answers that must be JSON, from a model that writes random bytes."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from pvrt_server.engine.grammar import GrammarCompiler
from pvrt_server.engine.sampling import Sampler, SamplingParams
from pvrt_server.errors import RequestError
from tests.fixtures.toy import VOCABULARY, toy_tokenizer
from tests.server.running import Server

HELLO: Any = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 3, "maximum": 99},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stream", [False, True])
def test_answers_follow_a_schema(server: Server, seed: int, stream: bool) -> None:
    options: Any = {"model": "toy", "messages": HELLO, "seed": seed}
    client = server.client()
    if stream:
        with client.chat.completions.stream(**options, response_format=FORMAT) as events:
            choice: Any = events.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(**options, response_format=FORMAT).choices[0]
    assert choice.finish_reason == "stop"
    pet = json.loads(choice.message.content)
    assert pet.keys() == {"name", "age", "kind"}
    assert len(pet["name"]) <= 5
    assert 3 <= pet["age"] <= 99
    assert pet["kind"] in ("cat", "dog")


def test_greedy_answers_and_completions_follow_it_too(server: Server) -> None:
    body = {"prompt": "ab", "response_format": FORMAT, "temperature": 0, "max_tokens": 200}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert json.loads(choice["text"])["age"] >= 3


def test_json_object_gives_an_object(server: Server) -> None:
    options: Any = {"logit_bias": {str(ord("}")): 8}, "max_tokens": 400, "seed": 1}
    answer = server.client().chat.completions.create(
        model="toy", messages=HELLO, response_format={"type": "json_object"}, **options
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "objec"}, "objec"),
        ({"$ref": "http://example.com/schema"}, "ref|Resource"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "minimum"),
        ({"$ref": "#/$defs/Missing"}, "Missing"),
    ],
)
def test_what_cannot_be_enforced_is_refused(server: Server, schema: Any, message: str) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        server.client().chat.completions.create(model="toy", messages=HELLO, response_format=form)
    assert caught.value.param == "response_format"
    assert "whitespace_flexible" not in caught.value.message  # our own grammar is not their concern


def test_a_grammar_leaves_only_what_may_come_next() -> None:
    compiler = GrammarCompiler(toy_tokenizer(), VOCABULARY, frozenset({257}))
    grammar = compiler.json_schema({"const": "ab"}, "response_format")()
    sampler = Sampler(SamplingParams(seed=0), [1], VOCABULARY, torch.device("cpu"), grammar)
    tokens = [sampler.choose(torch.zeros(VOCABULARY)) for _ in range(4)]
    assert toy_tokenizer().decode(tokens) == '"ab"'
    assert grammar.done
    assert sampler.choose(torch.zeros(VOCABULARY)) == 257


def test_json_has_no_room_for_blanks() -> None:
    """Every blank that may come, comes: those of json.dumps."""
    tokenizer = toy_tokenizer()
    compiler = GrammarCompiler(tokenizer, VOCABULARY, frozenset({257}))
    properties = {"a": {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}}
    schema = {"type": "object", "properties": properties, "required": ["a"]}
    grammar = compiler.json_schema({**schema, "additionalProperties": False}, "response_format")()
    blanks = {tokenizer.encode(blank, add_special_tokens=False)[0]: 50.0 for blank in " \n\t\r"}
    params = SamplingParams(seed=0, logit_bias=blanks)
    sampler = Sampler(params, [1], VOCABULARY, torch.device("cpu"), grammar)
    tokens = []
    while not grammar.done:
        tokens.append(sampler.choose(torch.zeros(VOCABULARY)))
    assert tokenizer.decode(tokens, skip_special_tokens=True) == '{"a": [1, 1]}'


def test_a_grammar_needs_a_fast_tokenizer(toy: Path) -> None:
    compiler = GrammarCompiler(object(), VOCABULARY, frozenset({257}))
    with pytest.raises(RequestError, match="cannot be used with grammars"):
        compiler.json_schema({}, "response_format")
