"""How far a model's next-token distributions are from those of its original.

KL(original || model) in nats over the full vocabulary, per token; the loss of both; and how often
both would choose the same token.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pvrt.errors import DataError
from pvrt.tools.recording import Continuation, Head, Recording

#: Of logits that exist at once.
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Mean:
    """A mean over tokens and its standard error, tokens counted as independent."""

    value: float
    standard_error: float

    @classmethod
    def of(cls, values: Tensor) -> "Mean":
        """Of all elements, of which there are two or more."""
        deviation = float(values.double().std())
        return cls(float(values.double().mean()), deviation / math.sqrt(values.numel()))


@dataclass(frozen=True)
class TokenFigures:
    """Figures of every predicted token, each [windows, context - 1].

    kl, original_loss, loss: nats, float64. same: whether both models' likeliest token is one, bool.
    """

    kl: Tensor
    original_loss: Tensor
    loss: Tensor
    same: Tensor


@dataclass(frozen=True)
class Divergence:
    """KL(original || model) in nats per token; by_position is its mean over windows at each number
    of tokens seen (from 1). same_top: share of tokens at which the likeliest token is the same.
    """

    mean: float
    standard_error: float
    median: float
    percentile_99: float
    largest: float
    same_top: float
    by_position: list[float]

    @classmethod
    def of(cls, tokens: TokenFigures) -> "Divergence":
        """Summary over all tokens."""
        kl, mean = tokens.kl.flatten(), Mean.of(tokens.kl)
        ordered = kl.sort().values
        return cls(
            mean.value,
            mean.standard_error,
            float(ordered[len(kl) // 2]),
            float(ordered[min(len(kl) - 1, round(0.99 * len(kl)))]),
            float(ordered[-1]),
            float(tokens.same.double().mean()),
            tokens.kl.mean(0).tolist(),
        )


@torch.inference_mode()
def diverge(original: Recording, model: Recording) -> TokenFigures:
    """Figures of every predicted token of two recordings of the same windows.

    Raises DataError when the vocabularies differ. Memory: two chunks of 64 MiB of logits, and what
    softmax makes of them.
    """
    check_vocabulary(original.head, model.head)
    targets = original.tokens[:, 1:].flatten()
    states = original.hidden.flatten(0, 1), model.hidden.flatten(0, 1)
    rows = max(1, CHUNK_BYTES // (4 * original.head.vocabulary))
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        wanted = F.log_softmax(original.head.logits(states[0][part]), -1)
        given = F.log_softmax(model.head.logits(states[1][part]), -1).to(wanted.device)
        ids = targets[part, None].to(wanted.device)
        figures = (
            _kl(wanted, given),
            -wanted.gather(1, ids)[:, 0].double(),
            -given.gather(1, ids)[:, 0].double(),
            wanted.argmax(1) == given.argmax(1),
        )
        parts.append(tuple(figure.cpu() for figure in figures))
    shape = original.hidden.shape[:2]
    return TokenFigures(*(torch.cat(part).view(shape) for part in zip(*parts, strict=True)))


def _kl(wanted: Tensor, given: Tensor) -> Tensor:
    """KL [n] float64 of log-probabilities [n, vocabulary]. What one model excludes (probability
    exactly 0, as padding of a vocabulary may have) counts nothing where the other does, too.
    """
    terms = wanted.exp() * (wanted - given)
    return terms.masked_fill_(wanted == -math.inf, 0.0).sum(1, dtype=torch.float64)


def check_vocabulary(original: Head, model: Head) -> None:
    """Raise DataError unless two heads give logits over equally many tokens."""
    sizes = original.vocabulary, model.vocabulary
    if sizes[0] != sizes[1]:
        raise DataError(
            f"the original has a vocabulary of {sizes[0]} tokens and the other model one of "
            f"{sizes[1]}: they are not of one family, and no KL is defined between them"
        )


@dataclass(frozen=True)
class Difference:
    """Where two greedy continuations part: the place (from 0), both tokens, and the KL there."""

    place: int
    original_token: int
    token: int
    kl: float


@torch.inference_mode()
def first_difference(original: Recording, model: Recording, prompt: int) -> Difference | None:
    """Where the continuations of a prompt (by number) first differ; None where one is the other or
    its beginning. Until there both models have read the same, so that a KL is defined.
    """
    ours, theirs = original.continuations[prompt], model.continuations[prompt]
    place = common(ours, theirs)
    if place == min(len(ours.tokens), len(theirs.tokens)):
        return None
    wanted = F.log_softmax(original.head.logits(ours.hidden[place][None]), -1)
    given = F.log_softmax(model.head.logits(theirs.hidden[place][None]), -1).to(wanted.device)
    kl = float(_kl(wanted, given))
    return Difference(place, ours.tokens[place], theirs.tokens[place], kl)


def common(ours: Continuation, theirs: Continuation) -> int:
    """How many tokens two continuations begin with alike."""
    pairs = zip(ours.tokens, theirs.tokens, strict=False)
    return next(
        (place for place, (a, b) in enumerate(pairs) if a != b),
        min(len(ours.tokens), len(theirs.tokens)),
    )
