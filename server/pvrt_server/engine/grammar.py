"""Answers that must be JSON, follow a JSON schema, or call a tool: grammars over tokens.

llguidance does the work. It computes which tokens may come next as they are needed, in about a
millisecond, so that a schema costs nothing at the start.
"""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from pvrt_server.engine.grammar_check import check_grammar
from pvrt_server.errors import RequestError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

#: As json.dumps writes it, and no other way: small models write blanks to the end wherever they
#: may. A whitespace_pattern is no bound, because llguidance lets it come again and again.
JSON_STYLE: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


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


class GrammarError(ArithmeticError):
    """A grammar that got stuck: its limits were reached while an answer followed it."""


class GrammarCompiler:
    """Makes grammars for one tokenizer (a fast one of transformers) and vocabulary size."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos_ids: frozenset[int]) -> None:
        self._parts = (tokenizer, vocabulary, sorted(eos_ids))
        self._tokenizer: LLTokenizer | None = None

    def json_schema(self, schema: Mapping[str, Any], field: str) -> Callable[[], Grammar]:
        """Answers that are JSON of a schema. Raises RequestError naming `field`."""
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_STYLE)
        except ValueError as error:
            raise RequestError(f"{field} cannot be enforced: {error}", field) from error
        return self._compile(grammar, field)

    def lark(self, grammar: str, field: str) -> Callable[[], Grammar]:
        """Answers of a grammar in llguidance's Lark. Raises RequestError naming `field`."""
        return self._compile(LLMatcher.grammar_from_lark(grammar), field)

    def _compile(self, grammar: str, field: str) -> Callable[[], Grammar]:
        check_grammar(grammar, field)
        tokenizer = self._load()
        if problem := LLMatcher.validate_grammar(grammar, tokenizer):
            reason = " ".join(problem.split())
            raise RequestError(f"{field} cannot be enforced: {reason}", field)
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
