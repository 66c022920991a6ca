"""What a busy machine has no time to find out about a grammar is nothing that is said of it."""

import pytest
from llguidance import LLMatcher

from pvrt_server.engine import grammar_check
from pvrt_server.errors import BusyError

GRAMMAR = LLMatcher.grammar_from_json_schema('{"enum": ["seldom", "asked"]}')


def test_a_grammar_that_was_not_checked_in_time_is_neither_refused_nor_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as busy:
        busy.setattr(grammar_check, "_SECONDS", 0.001)
        with pytest.raises(BusyError, match="try again"):
            grammar_check.check_grammar(GRAMMAR, "response_format")
    grammar_check.check_grammar(GRAMMAR, "response_format")
