"""JSON schemas as generators write them, made ready for llguidance.

An answer must always be valid for the schema that was sent, as far as llguidance can see to it. So
a schema only ever becomes narrower here, or loses what cannot be enforced:

- An object that lists its properties and says nothing of others is closed, as in vLLM: small models
  would write keys of their own up to the length limit. Schemas that put objects together (allOf,
  and anyOf, oneOf or $ref beside properties) stay open, because closed parts contradict each other.
- propertyNames become properties or patternProperties where they are a list or a pattern.
- Patterns lose look-around and word borders, which llguidance's regular expressions lack.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher

Schema = dict[str, Any]
# Where a schema holds schemas: under names, in a list, or as a value.
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = ("items", "additionalProperties", "contains", "not", "if", "then", "else")
_JOINING = ("allOf", "anyOf", "oneOf", "$ref", "if")
_ABOUT_OTHERS = ("additionalProperties", "patternProperties")
_LOOK_AROUND = re.compile(r"\(\?(?:=|!|<=|<!)")


def enforceable(schema: Schema) -> tuple[Schema, list[str]]:
    """A schema for llguidance, and in words what had to be left out of it."""
    notes: list[str] = []
    open_objects = _joins(schema)

    def ready(node: Schema) -> Schema:
        node = _with_names_listed(mapped(node, ready), schema, notes)
        pattern = node.get("pattern")
        if isinstance(pattern, str) and (known := _enforceable_pattern(pattern)) != pattern:
            notes.append(f"the pattern {pattern} as a whole")
            node = {key: value for key, value in node.items() if key != "pattern"}
            node |= {} if known is None else {"pattern": known}
        listed = isinstance(node.get("properties"), dict)
        if listed and not open_objects and not any(key in node for key in _ABOUT_OTHERS):
            node = {**node, "additionalProperties": False}
            node.pop("unevaluatedProperties", None)
        return node

    return ready(schema), notes


def mapped(node: Schema, change: Callable[[Schema], Schema]) -> Schema:
    """A schema whose direct parts are changed."""
    changed = dict(node)
    for key, value in node.items():
        if key in _NAMED and isinstance(value, dict):
            changed[key] = {
                name: change(part) if isinstance(part, dict) else part
                for name, part in value.items()
            }
        elif key in _LISTED and isinstance(value, list):
            changed[key] = [change(part) if isinstance(part, dict) else part for part in value]
        elif key in _SINGLE and isinstance(value, dict):
            changed[key] = change(value)
    return changed


def _joins(schema: Schema) -> bool:
    """Whether an object's properties are spread over several parts of a schema."""
    found = False

    def look(node: Schema) -> Schema:
        nonlocal found
        branches = node.get("allOf")
        found |= isinstance(branches, list) and len(branches) > 1
        found |= "properties" in node and any(key in node for key in _JOINING)
        found |= isinstance(branches, list) and "$ref" in node
        return mapped(node, look)

    look(schema)
    return found


def _with_names_listed(node: Schema, root: Schema, notes: list[str]) -> Schema:
    """propertyNames as properties or patternProperties; what is neither is left out."""
    names = node.get("propertyNames")
    if not isinstance(names, dict):
        return node
    node = {key: value for key, value in node.items() if key != "propertyNames"}
    place = re.fullmatch(r"#/(\$defs|definitions)/([^/~%]+)", str(names.get("$ref")))
    if place is not None:
        names = (root.get(place[1]) or {}).get(place[2], names)
    allowed = names.get("enum", [names["const"]] if "const" in names else None)
    value = node.get("additionalProperties", True)
    if isinstance(allowed, list):
        others = {name: value for name in allowed if isinstance(name, str)}
        properties = {**others, **(node.get("properties") or {})}
        return {**node, "properties": properties, "additionalProperties": False}
    pattern = names.get("pattern")
    if isinstance(pattern, str) and _enforceable_pattern(pattern) == pattern:
        return {**node, "patternProperties": {pattern: value}, "additionalProperties": False}
    if names != {"type": "string"}:
        notes.append("propertyNames that are neither a list nor a pattern")
    return node


@lru_cache(maxsize=1024)
def _enforceable_pattern(pattern: str) -> str | None:
    """A pattern that llguidance knows and that matches at least the same; None for none."""
    for known in (pattern, _without_assertions(pattern)):
        schema = {"type": "string", "pattern": known}
        if not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema)):
            return known
    return None


def _without_assertions(pattern: str) -> str:
    r"""Without look-around, \b and \B: they match no characters, so the rest matches more."""
    kept, place = "", 0
    while place < len(pattern):
        if _LOOK_AROUND.match(pattern, place):
            place = _group_end(pattern, place)
            continue
        step = 2 if pattern[place] == "\\" else 1
        piece = pattern[place : place + step]
        if pattern[place] == "[":
            piece = pattern[place : _class_end(pattern, place)]
        kept += "" if piece in (r"\b", r"\B") else piece
        place += len(piece)
    return kept


def _group_end(pattern: str, place: int) -> int:
    depth = 0
    while place < len(pattern):
        char = pattern[place]
        if char == "[":
            place = _class_end(pattern, place)
            continue
        depth += (char == "(") - (char == ")")
        place += 2 if char == "\\" else 1
        if depth == 0:
            break
    return place


def _class_end(pattern: str, place: int) -> int:
    """After the ] that closes the character class at a place."""
    place += 1
    while place < len(pattern) and pattern[place] != "]":
        place += 2 if pattern[place] == "\\" else 1
    return place + 1
