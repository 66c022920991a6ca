"""Schemas as pydantic and Zod write them: accepted, and as narrow as can be enforced."""

import datetime
import decimal
import json
import pathlib
import shutil
import subprocess
from typing import Any, Literal

import pydantic
import pytest
import torch

from pvrt_server.engine.grammar import GrammarCompiler
from pvrt_server.engine.json_schema import enforceable
from tests.fixtures.toy import VOCABULARY, toy_tokenizer

ZOD_EMAIL = (
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@"
    r"([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
)
DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"  # pydantic's


def in_object(x: Any, **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"x": x},
        "required": ["x"],
        "additionalProperties": False,
        **more,
    }


def string(**more: Any) -> dict[str, Any]:
    return {"type": "string", **more}


KINDS = {"Kind": {"enum": ["a", "b"], "type": "string"}}
INTS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "integer"}}
PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}

#: What generators write, an answer that fits, and one that the grammar must still make impossible.
CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "set": (in_object({"type": "array", "items": string(), "uniqueItems": True}), ["a"], [1]),
    "decimal": (in_object(string(pattern=DECIMAL)), "-1.5", "one"),
    "email": (in_object(string(format="email", pattern=ZOD_EMAIL)), "a@b.de", "a b"),
    "word borders": (in_object(string(pattern=r"^\bfoo[(?=]?\B$")), "foo", "bar"),
    "back reference": (in_object(string(pattern=r"^(a)\1$")), "aa", 1),
    "overlapping oneOf": (in_object({"oneOf": [{"type": "integer"}, {"type": "number"}]}), 1, "1"),
    "not": (in_object(string(**{"not": {"const": "no"}})), "yes", 1),
    "record of names": (in_object({**INTS, "propertyNames": {"enum": ["a"]}}), {"a": 1}, {"c": 1}),
    "record of one": (in_object({**INTS, "propertyNames": {"const": "a"}}), {"a": 1}, {"c": 1}),
    "record of an enum": (
        in_object({**INTS, "propertyNames": {"$ref": "#/$defs/Kind"}}, **{"$defs": KINDS}),
        {"b": 1},
        {"c": 1},
    ),
    "record of a pattern": (
        in_object({**INTS, "propertyNames": {"pattern": "^k[0-9]$"}}),
        {"k1": 1},
        {"c": 1},
    ),
    "record": (in_object({**INTS, "propertyNames": {"type": "string"}}), {"a": 1}, {"a": "b"}),
    "short names": (in_object({**INTS, "propertyNames": {"maxLength": 2}}), {"a": 1}, {"a": "b"}),
    "silent about other keys": (in_object(PERSON), {"age": 1}, {"age": 1, "b": 2}),
    "other keys said": (
        in_object({**PERSON, "additionalProperties": {"type": "integer"}}),
        {"age": 1, "b": 2},
        {"age": 1, "b": "c"},
    ),
    "unevaluated": (in_object({**PERSON, "unevaluatedProperties": False}), {"age": 1}, {"b": 2}),
    "named like a keyword": (
        in_object({**PERSON, "properties": {"age": {"type": "integer"}, "pattern": string()}}),
        {"age": 1, "pattern": "("},
        {"age": 1, "pattern": 2},
    ),
    "joined objects": (
        in_object({"allOf": [PERSON, {"properties": {"b": {"type": "integer"}}}]}),
        {"age": 1, "b": 2},
        {"age": "c"},
    ),
    "union": (in_object({"anyOf": [PERSON, {"type": "null"}]}), {"age": 1}, {"b": 2}),
    **{
        f"format {name}": (in_object(string(format=name)), text, 1)
        for name, text in (
            ("path", "/tmp"),
            ("binary", "x"),
            ("password", "x"),
            ("ipvanyaddress", "::1"),
            ("json-string", "{}"),
            ("postgres-dsn", "postgres://a"),
            ("base64", "YQ=="),
            ("nanoid", "x"),
            ("cuid2", "x"),
            ("ulid", "x"),
            ("jwt", "a.b.c"),
            ("emoji", "😀"),
            ("e164", "+49"),
            ("cidrv4", "1.2.3.4/5"),
            ("duration", "P1D"),
        )
    },
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(toy_tokenizer(), VOCABULARY, frozenset({257}))


def follows(compiler: GrammarCompiler, schema: dict[str, Any], value: Any) -> bool:
    grammar = compiler.json_schema(schema, "response_format")()
    for token in toy_tokenizer().encode(
        json.dumps(value, ensure_ascii=False), add_special_tokens=False
    ):
        if grammar.forbidden(torch.device("cpu"))[token]:
            return False
        grammar.accept(token)
    return not bool(grammar.forbidden(torch.device("cpu"))[257])


@pytest.mark.parametrize("name", CASES)
def test_what_generators_write_is_enforced_as_far_as_can_be(
    compiler: GrammarCompiler, name: str
) -> None:
    schema, fits, fails = CASES[name]
    before = json.dumps(schema)
    assert follows(compiler, schema, {"x": fits})
    assert not follows(compiler, schema, {"x": fails})
    assert json.dumps(schema) == before


def test_what_is_not_enforced_is_told() -> None:
    schema = in_object(string(pattern="^(?=a)a$"), propertyNames={"maxLength": 3})
    ready, notes = enforceable(schema)
    assert ready["properties"]["x"]["pattern"] == "^a$"
    assert len(notes) == 2
    assert enforceable(in_object(PERSON))[1] == []


def test_schemas_of_zod_and_pydantic_are_taken(compiler: GrammarCompiler) -> None:
    class Everything(pydantic.BaseModel):
        file: pathlib.Path
        data: bytes
        secret: pydantic.SecretStr
        ip: pydantic.IPvAnyAddress
        text: pydantic.Json[Any]
        database: pydantic.PostgresDsn
        tags: set[str]
        price: decimal.Decimal
        sizes: dict[Literal["a", "b"], int]
        either: int | float
        url: pydantic.HttpUrl
        when: datetime.datetime | datetime.timedelta
        pair: tuple[int, str]

    schemas = {"pydantic": Everything.model_json_schema()}
    node, folder = shutil.which("node"), pathlib.Path(__file__).parents[1] / "api" / "node"
    if node is not None and (folder / "node_modules").is_dir():
        done = subprocess.run([node, "zod.mjs"], cwd=folder, capture_output=True, check=True)
        schemas |= json.loads(done.stdout)
    assert not any("$defs" in schema for schema in schemas.values())
    # In one: each grammar is checked by a process of its own.
    compiler.json_schema({"type": "object", "properties": schemas}, "response_format")
