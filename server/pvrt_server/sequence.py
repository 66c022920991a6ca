"""One sequence from prompt to finish: prefill, then a token at a time, as a stream of events."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pvrt_server.models import LanguageModel
from pvrt_server.sampling import Sampler, SamplingParams, TokenLogprob, score
from pvrt_server.text import StopFilter, TextCodec

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt (token ids) and how to continue it."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class PromptEvent:
    """The prompt is read. `index` is the sequence's place in its job.

    logprobs has one entry per prompt token (None for the first, which nothing predicts) when
    prompt_logprobs was asked for, otherwise none. finish_reason is set when max_tokens is 0.
    """

    index: int
    logprobs: tuple[TokenLogprob | None, ...]
    finish_reason: FinishReason | None


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
    """What all sequences of an engine share. Lengths count tokens."""

    model: LanguageModel
    codec: TextCodec
    eos_ids: frozenset[int]
    vocabulary: int
    max_model_len: int
    prefill_chunk: int


def decode(
    runtime: Runtime, index: int, request: GenerationRequest
) -> Iterator[PromptEvent | TokenEvent | None]:
    """Run one sequence. None is yielded between pieces of a long prompt: a point to give up at.

    The caller holds torch.inference_mode for the whole iteration.
    """
    state = runtime.model.start()
    params, prompt = request.params, request.prompt_ids
    scores: list[TokenLogprob | None] = []
    if params.prompt_logprobs is not None:
        scores.append(None)
    logits = torch.empty(0)
    for start in range(0, len(prompt), runtime.prefill_chunk):
        if start:
            yield None
        chunk = prompt[start : start + runtime.prefill_chunk]
        targets = prompt[start + 1 : start + 1 + len(chunk)]
        keep = 1 if params.prompt_logprobs is None else len(chunk)
        rows = runtime.model.forward(state, chunk, keep)
        if params.prompt_logprobs is not None and targets:
            ids = torch.tensor(targets, device=rows.device)
            scores += score(rows[: len(targets)], ids, params.prompt_logprobs)
        logits = rows[-1]
    limit = runtime.max_model_len - len(prompt)
    if params.max_tokens is not None:
        limit = min(limit, params.max_tokens)
    yield PromptEvent(index, tuple(scores), "length" if limit == 0 else None)
    if limit:
        yield from _generate(runtime, index, request, state, logits, limit)


def _generate(
    runtime: Runtime,
    index: int,
    request: GenerationRequest,
    state: Any,
    logits: Tensor,
    limit: int,
) -> Iterator[TokenEvent]:
    params = request.params
    sampler = Sampler(params, request.prompt_ids, runtime.vocabulary, logits.device)
    stream = runtime.codec.stream(request.prompt_ids)
    stops = StopFilter(params.stop)
    eos_ids = frozenset() if params.ignore_eos else runtime.eos_ids
    for number in range(1, limit + 1):
        token = sampler.choose(logits)
        logprob = None
        if params.logprobs is not None:
            ids = torch.tensor([token], device=logits.device)
            logprob = score(logits[None], ids, params.logprobs)[0]
        offset, text = stream.length, ""
        reason: FinishReason | None = None
        if token in eos_ids:
            reason = "stop"
        else:
            text, stopped = stops.push(stream.push(token))
            if stopped:
                reason = "stop"
            elif number == limit:
                reason = "length"
        if reason is not None:
            text += stops.flush()
        yield TokenEvent(index, token, text, offset, logprob, reason)
        if reason is not None:
            return
        logits = runtime.model.forward(state, (token,), 1, params.argmax_only)[-1]
