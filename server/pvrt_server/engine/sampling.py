"""From logits to the next token of one sequence.

The order is the one that vLLM uses: grammar, logit bias, penalties, temperature, min-p, top-k,
top-p. Reported log-probabilities are the model's own, before any of these.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pvrt_server.engine.grammar import Grammar
from pvrt_server.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOPS = 64
# JSON has no infinity; this is what OpenAI and vLLM send in its place.
LOWEST_LOGPROB = -9999.0
_FEW = 256
_SEED_LIMIT = 1 << 63


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt. Raises RequestError, naming the field, for a value out of range.

    max_tokens None means to the end of the context; 0 only reads the prompt. temperature 0 is
    greedy. top_k 0 or -1, top_p 1 and min_p 0 are off. seed None draws a fresh one. logprobs and
    prompt_logprobs are the numbers of alternatives to report per token, None for no report.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, 0, math.inf)
        _check("temperature", self.temperature, 0, 2)
        _check("top_p", self.top_p, 0, 1)
        _check("top_k", self.top_k, -1, math.inf)
        _check("min_p", self.min_p, 0, 1)
        _check("seed", self.seed, -_SEED_LIMIT, _SEED_LIMIT - 1)
        _check("presence_penalty", self.presence_penalty, -2, 2)
        _check("frequency_penalty", self.frequency_penalty, -2, 2)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        for value in self.logit_bias.values():
            _check("logit_bias", value, -100, 100)
        if "" in self.stop:
            raise RequestError("stop must not hold an empty string", "stop")
        if len(self.stop) > MAX_STOPS:
            raise RequestError(
                f"stop holds {len(self.stop)} strings; the most is {MAX_STOPS}", "stop"
            )

    @property
    def argmax_only(self) -> bool:
        """Whether nothing but the largest of the model's own logits is ever asked for."""
        return (
            self.temperature == 0
            and self.logprobs is None
            and not self.logit_bias
            and not self.presence_penalty
            and not self.frequency_penalty
            and self.repetition_penalty == 1
        )


def _check(name: str, value: float | None, low: float, high: float) -> None:
    if value is None or low <= value <= high:
        return
    wanted = f"at least {low}" if high == math.inf else f"between {low} and {high}"
    raise RequestError(f"{name} is {value}; it must be {wanted}", name)


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probability of a token, and the most likely tokens in its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def score(logits: Tensor, token_ids: Tensor, alternatives: int) -> list[TokenLogprob]:
    """Log-probabilities of token_ids [N] under logits [N, V] (float32)."""
    total = logits.logsumexp(-1, keepdim=True)
    chosen = (logits.gather(1, token_ids[:, None]) - total)[:, 0].tolist()
    values, indices = logits.topk(alternatives, dim=-1)
    rows = zip(token_ids.tolist(), chosen, indices.tolist(), (values - total).tolist(), strict=True)
    return [
        TokenLogprob(
            token,
            max(logprob, LOWEST_LOGPROB),
            tuple((i, max(v, LOWEST_LOGPROB)) for i, v in zip(ids, tops, strict=True)),
        )
        for token, logprob, ids, tops in rows
    ]


class Sampler:
    """Chooses the tokens of one sequence; holds its random state and its counts."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocabulary: int,
        device: torch.device,
        grammar: Grammar | None = None,
    ) -> None:
        self._params = params
        self._grammar = grammar
        self._generator = torch.Generator()  # of the CPU: a seed means the same on every device
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            ids, values = zip(*params.logit_bias.items(), strict=True)
            self._bias = (
                torch.tensor(ids, device=device),
                torch.tensor(values, dtype=torch.float32, device=device),
            )
        self._counts: Tensor | None = None
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            self._counts = torch.zeros(vocabulary, device=device)
            self._in_prompt = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self._in_prompt[torch.tensor(prompt_ids, device=device)] = True

    def choose(self, logits: Tensor) -> int:
        """The next token for logits [V] (float32).

        Raises FloatingPointError when the model computed no finite logits.
        """
        if self._grammar is not None:
            logits = logits.masked_fill(self._grammar.forbidden(logits.device), -math.inf)
        if self._bias is not None:
            logits = logits.index_add(0, *self._bias)
        if self._counts is not None:
            logits = self._penalised(logits, self._counts)
        best, index = logits.max(-1)
        if not math.isfinite(highest := float(best)):
            raise FloatingPointError(
                "the model computed logits that are not numbers; serve it with --dtype float32"
            )
        if self._params.temperature == 0:
            token = int(index)
        else:
            # The difference first: dividing large logits by a tiny temperature overflows.
            token = self._draw((logits - highest) / self._params.temperature)
        if self._counts is not None:
            self._counts[token] += 1
        if self._grammar is not None:
            self._grammar.accept(token)
        return token

    def _penalised(self, logits: Tensor, counts: Tensor) -> Tensor:
        params = self._params
        seen = counts > 0
        if params.repetition_penalty != 1:
            factor = params.repetition_penalty
            shrunk = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where(seen | self._in_prompt, shrunk, logits)
        return logits - params.presence_penalty * seen - params.frequency_penalty * counts

    def _draw(self, logits: Tensor) -> int:
        params = self._params
        ids: Tensor | None = None
        if 0 < params.top_k < logits.shape[0]:
            logits, ids = logits.topk(params.top_k)
        probabilities = logits.softmax(-1)
        if params.min_p > 0:
            floor = params.min_p * probabilities.max()
            probabilities = probabilities.masked_fill(probabilities < floor, 0)
            probabilities = probabilities / probabilities.sum()
        if params.top_p < 1:
            if ids is None:
                probabilities, ids = _likeliest(probabilities, params.top_p)
            before = probabilities.cumsum(-1) - probabilities
            # Not 0, so that the likeliest token stays when top_p is 0.
            probabilities = probabilities.masked_fill(before >= max(params.top_p, 1e-9), 0)
        # Not torch.multinomial, which draws a random number per token of the vocabulary: 1.3 ms
        # per choice from 49152 on one core, this 0.2.
        total = probabilities.cumsum(-1, dtype=torch.float64)
        random = float(torch.rand(1, generator=self._generator, dtype=torch.float64))
        # From (0, 1], so that rounding cannot lead past the end or to a token of probability 0.
        pick = torch.searchsorted(total, (1 - random) * total[-1:])
        return int(pick if ids is None else ids[pick])


def _likeliest(probabilities: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, best first, at least as many as make up `mass`; and their ids.

    Few do, nearly always, and finding them is ten times faster than sorting the vocabulary.
    """
    few, ids = probabilities.topk(min(_FEW, probabilities.shape[0]))
    if float(few.sum()) >= mass:
        return few, ids
    return probabilities.sort(descending=True)
