"""One sequence from prompt to finish: what it has read, what it writes next, and its events."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pvrt_server.engine.grammar import Grammar
from pvrt_server.engine.models import LanguageModel
from pvrt_server.engine.sampling import Sampler, SamplingParams, TokenLogprob, score
from pvrt_server.engine.text import StopFilter, TextCodec

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt (token ids) and how to continue it.

    grammar makes a fresh grammar that the answer must follow.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    grammar: Callable[[], Grammar] | None = None


@dataclass(frozen=True)
class PromptEvent:
    """The prompt is read. `index` is the sequence's place in its job.

    logprobs has one entry per prompt token (None for the first, which nothing predicts) when
    prompt_logprobs was asked for, otherwise none. finish_reason is set when max_tokens is 0.
    cached counts the tokens that were known from an earlier sequence.
    """

    index: int
    logprobs: tuple[TokenLogprob | None, ...]
    finish_reason: FinishReason | None
    cached: int = 0


@dataclass(frozen=True)
class TokenEvent:
    """One generated token.

    `text` is what can be shown now: it may lag behind the tokens where a character or a stop
    string may be under way. `offset` counts the characters generated before this token. The last
    event of a sequence, and no other, has a finish_reason.
    """

    index: int
    token_id: int
    text: str
    offset: int
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Runtime:
    """What all sequences of an engine share. Lengths count tokens.

    cache_tokens bounds what all sequences, finished ones that may be used again included, keep in
    the model's cache; it is at least max_model_len.
    """

    model: LanguageModel
    codec: TextCodec
    eos_ids: frozenset[int]
    vocabulary: int
    max_model_len: int
    prefill_chunk: int
    max_sequences: int
    cache_tokens: int
    prefix_reuse: bool = True


class Times:
    """When things happened to a sequence, in seconds after its arrival."""

    def __init__(self) -> None:
        self._arrived = time.monotonic()
        self._last = math.nan
        self.queued = math.nan
        self.to_first = math.nan

    @property
    def whole(self) -> float:
        """Until now."""
        return time.monotonic() - self._arrived

    def admit(self) -> bool:
        """The sequence runs; whether for the first time."""
        first = math.isnan(self.queued)
        if first:
            self.queued = self.whole
        return first

    def token(self) -> float | None:
        """There is a token: seconds since the one before, None for the first."""
        now, last = self.whole, self._last
        self._last = now
        if math.isnan(last):
            self.to_first = now
            return None
        return now - last


class Sequence:
    """A request under way. The caller holds torch.inference_mode.

    Its state, once it has one, holds the first of its tokens; all others are pending. Exactly one
    is pending while it decodes. Losing the state costs time and nothing else.
    """

    def __init__(self, runtime: Runtime, index: int, request: GenerationRequest) -> None:
        self.index = index
        self.request = request
        self.tokens = list(request.prompt_ids)  # prompt, then answer
        self.state: Any | None = None
        self.finish_reason: FinishReason | None = None
        self.prompt_read = False
        self.cached = 0
        self.times = Times()
        self._runtime = runtime
        self._scores: list[TokenLogprob | None] = []
        self._limit = runtime.max_model_len
        if request.params.max_tokens is not None:
            self._limit = min(self._limit, len(self.tokens) + request.params.max_tokens)
        self._eos_ids = frozenset() if request.params.ignore_eos else runtime.eos_ids

    @property
    def held(self) -> int:
        """How many tokens its state holds. May be asked from any thread."""
        state = self.state
        return 0 if state is None else int(state.length)

    @property
    def pending(self) -> int:
        """How many tokens the model has not read."""
        return len(self.tokens) - self.held

    @property
    def generated(self) -> int:
        """How many tokens were generated."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def decoding(self) -> bool:
        """Whether the sequence waits for its next token, and for nothing else."""
        return self.prompt_read and self.pending == 1

    @property
    def argmax_only(self) -> bool:
        """Whether nothing but the largest logit is ever asked for."""
        return self.request.grammar is None and self.request.params.argmax_only

    @property
    def scores_prompt(self) -> bool:
        """Whether the model's logits for the prompt are asked for."""
        return self.request.params.prompt_logprobs is not None and not self.prompt_read

    def read(self, count: int) -> list[PromptEvent | TokenEvent]:
        """Read at most `count` pending tokens; events once there are none left."""
        if self.state is None:
            self.state = self._runtime.model.start()
        start = self.state.length
        chunk = self.tokens[start : start + count]
        keep = len(chunk) if self.scores_prompt else 1
        rows = self._runtime.model.read(self.state, chunk, keep)
        if self.scores_prompt:
            self._score_prompt(rows, start)
        return [] if self.pending else self.advance(rows[-1])

    def _score_prompt(self, rows: Tensor, start: int) -> None:
        if start == 0:
            self._scores = [None]
        targets = self.tokens[start + 1 : start + 1 + len(rows)]
        if targets:
            ids = torch.tensor(targets, device=rows.device)
            alternatives = self.request.params.prompt_logprobs or 0
            self._scores += score(rows[: len(targets)], ids, alternatives)

    def advance(self, logits: Tensor) -> list[PromptEvent | TokenEvent]:
        """What follows from the logits [V] after the last token: one more token, usually."""
        events: list[PromptEvent | TokenEvent] = []
        if not self.prompt_read:
            self.prompt_read = True
            if self._limit == len(self.tokens):
                self.finish_reason = "length"
            prompt_scores = tuple(self._scores)
            events.append(PromptEvent(self.index, prompt_scores, self.finish_reason, self.cached))
            if self.finish_reason is not None:
                return events
            self._prepare(logits.device)
        return [*events, self._next_token(logits)]

    def _prepare(self, device: torch.device) -> None:
        params, prompt = self.request.params, self.request.prompt_ids
        self._grammar = None if self.request.grammar is None else self.request.grammar()
        self._sampler = Sampler(params, prompt, self._runtime.vocabulary, device, self._grammar)
        self._stream = self._runtime.codec.stream(prompt)
        self._stops = StopFilter(params.stop)

    def _next_token(self, logits: Tensor) -> TokenEvent:
        params = self.request.params
        token = self._sampler.choose(logits)
        logprob = None
        if params.logprobs is not None:
            ids = torch.tensor([token], device=logits.device)
            logprob = score(logits[None], ids, params.logprobs)[0]
        self.tokens.append(token)
        offset, text = self._stream.length, ""
        done = self._grammar is not None and self._grammar.done
        if token in self._eos_ids or (done and token in self._runtime.eos_ids):
            self.finish_reason = "stop"
        else:
            text, stopped = self._stops.push(self._stream.push(token))
            if stopped or done:
                self.finish_reason = "stop"
            elif len(self.tokens) == self._limit:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._stops.flush()
        return TokenEvent(self.index, token, text, offset, logprob, self.finish_reason)
