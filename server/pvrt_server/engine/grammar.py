"""Answers that must be JSON, follow a JSON schema, or call a tool: grammars over tokens.

llguidance does the work. It computes which tokens may come next as they are needed, in about a
millisecond, so that a schema costs nothing at the start.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from pvrt_server.engine.grammar_check import check_grammar
from pvrt_server.engine.json_schema import enforceable
from pvrt_server.errors import RequestError
from pvrt_server.notices import say_once

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

#: As json.dumps writes it, and no other way: small models write blanks to the end wherever they
#: may. A whitespace_pattern is no bound, because llguidance lets it come again and again.
_JSON_STYLE: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    # What llguidance does not know is left to the model, and a oneOf is read as an anyOf.
    "lenient": True,
    "coerce_one_of": True,
}


def json_rule(schema: dict[str, Any], field: str) -> str:
    """JSON of a schema, as the right side of a rule of llguidance's Lark.

    Its references start at the schema's own root. Raises RequestError naming `field`.
    """
    try:
        ready, notes = enforceable(schema)
        text = json.dumps({**ready, "x-guidance": _JSON_STYLE})
    except RecursionError as error:
        raise RequestError(f"{field} cannot be enforced: it nests too deeply", field) from error
    for note in notes:
        say_once(f"not enforced in {field}: {note}")
    return f"%json {text}"


def check_schema(schema: dict[str, Any], field: str, what: str) -> None:
    """Raise RequestError, naming `field` and in words `what`, for a schema that no answer can be
    held to."""
    grammar = LLMatcher.grammar_from_lark(f"start: {json_rule(schema, what)}")
    check_grammar(grammar, field)
    if problem := LLMatcher.validate_grammar(grammar):
        raise RequestError(f"{what} cannot be enforced: {_reason(problem)[1]}", field)


def _reason(problem: str) -> tuple[int, str]:
    """The line of a grammar that llguidance refuses and why, without the grammar's own text."""
    told = re.sub(r"\n\s*\d+ \| .*", "", problem, flags=re.DOTALL)
    found = re.match(r"at (\d+)\(\d+\): (?:failed to compile JSON schema: )?", told)
    line, start = (int(found[1]), found.end()) if found else (1, 0)
    return line, " ".join(told[start:].split())[:500]


class Grammar:
    """One answer's place in a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def done(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()

    def forbidden(self, device: torch.device) -> Tensor:
        """Which tokens must not come next, bool [V]. Raises GrammarError."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._check()
        return (allowed == 0).to(device)

    def accept(self, token_id: int) -> None:
        """Go on with a token that is not forbidden. Raises GrammarError."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if error := self._matcher.get_error():
            raise GrammarError(error)


#: Makes a fresh grammar for each answer.
GrammarFactory = Callable[[], Grammar]


class GrammarError(ArithmeticError):
    """A grammar that got stuck: its limits were reached while an answer followed it."""


class GrammarCompiler:
    """Makes grammars for one tokenizer (a fast one of transformers) and vocabulary size."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos_ids: frozenset[int]) -> None:
        self._parts = (tokenizer, vocabulary, sorted(eos_ids))
        self._tokenizer: LLTokenizer | None = None

    def json_schema(self, schema: dict[str, Any], field: str) -> GrammarFactory:
        """Answers that are JSON of a schema. Raises RequestError naming `field`."""
        return self.lark(f"start: {json_rule(schema, field)}", field)

    def lark(
        self, rules: str, field: str, names: Mapping[str, str] | None = None
    ) -> GrammarFactory:
        """Answers of a grammar in llguidance's Lark, one rule a line.

        Raises RequestError naming `field` and, in words, what `names` says of the rule at fault.
        """
        grammar, tokenizer = LLMatcher.grammar_from_lark(rules), self._load()
        check_grammar(grammar, field)
        failed, said = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
        if failed:
            line, reason = _reason(said[0])
            rule = rules.splitlines()[line - 1].partition(":")[0]
            what = (names or {}).get(rule, field)
            raise RequestError(f"{what} cannot be enforced: {reason}", field)
        for warning in said:
            say_once(f"not enforced in {field}: {warning}")
        return lambda: Grammar(LLMatcher(tokenizer, grammar))

    def _load(self) -> LLTokenizer:
        """llguidance's view of the tokenizer; half a second, so made when first needed."""
        if self._tokenizer is None:
            from llguidance.hf import from_tokenizer

            tokenizer, vocabulary, eos_ids = self._parts
            try:
                self._tokenizer = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=eos_ids)
            except ValueError as error:
                raise RequestError(
                    f"this model's tokenizer cannot be used with grammars: {error}",
                    "response_format",
                    "unsupported_parameter",
                ) from error
        return self._tokenizer
