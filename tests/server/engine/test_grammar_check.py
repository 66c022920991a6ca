"""Grammars of a request, checked together by a process of its own."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher

from pvrt_server.engine import grammar_check
from pvrt_server.errors import BusyError, RequestError
from tests.server.abuse import BOMB, SCHEMAS


def grammar(schema: Any) -> str:
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema)))


GRAMMAR = grammar({"enum": ["seldom", "asked"]})
IMPOSSIBLE = grammar(SCHEMAS["itself"])


def test_a_grammar_that_was_not_checked_in_time_is_neither_refused_nor_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as busy:
        busy.setattr(grammar_check, "_SECONDS", 0.001)
        with pytest.raises(BusyError, match="try again"):
            grammar_check.check_grammar(GRAMMAR, "response_format")
    grammar_check.check_grammar(GRAMMAR, "response_format")


@pytest.mark.usefixtures("short_check")
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (grammar(BOMB), "it is too complex"),
        ("x" * (1 << 20), "it is longer than a megabyte"),
    ],
)
def test_the_field_at_fault_is_named(wrong: str, sentence: str) -> None:
    for given in ([("a", GRAMMAR), ("b", wrong)], [("b", wrong), ("a", GRAMMAR)]):
        with pytest.raises(RequestError, match=rf"^b cannot be enforced: {sentence}") as refused:
            grammar_check.check_grammars(given)
        assert refused.value.param == "b"
    grammar_check.check_grammars([("a", GRAMMAR), ("b", GRAMMAR)])
    grammar_check.check_grammars([])


def test_what_lets_no_answer_follow_is_told_from_what_costs_too_much() -> None:
    with pytest.raises(RequestError, match="b cannot be enforced: no answer can follow it"):
        grammar_check.check_grammars([("a", GRAMMAR), ("b", IMPOSSIBLE), ("c", GRAMMAR)])
