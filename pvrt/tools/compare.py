"""A dense model and what was made of it, side by side: quality, size, speed and greedy answers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvrt.errors import DataError
from pvrt.tools.divergence import Divergence, Mean, diverge, first_difference
from pvrt.tools.held_out import HeldOut
from pvrt.tools.recording import Progress, Recording, record
from pvrt.tools.sizes import Curves, Sizes

#: What is asked where nobody says: of models with a chat template, and of others.
QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train leaves at 9:40 and arrives at 11:05. How long does the journey take?",
)
BEGINNINGS = (
    "The capital of France is",
    "The sky is blue because",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
)


@dataclass(frozen=True)
class Side:
    """A model to compare.

    load gives the model in a floating type on its device; None is the type it is measured in.
    longest: tokens that it was made to read at once, None where nothing says. speed measures tokens
    per second of greedy decoding, None where nothing here decodes it.
    """

    name: str
    tokenizer: Any
    load: Callable[[torch.dtype | None], Any]
    sizes: Sizes
    longest: int | None = None
    scheme: str | None = None
    curves: Curves | None = None
    speed: Callable[[], float | None] = lambda: None


def short(name: str) -> str:
    """The last part of a path or hub id."""
    return Path(name).name or name


@dataclass(frozen=True)
class Probe:
    """What models are compared on: windows [n, context] of a named text, and prompts to continue
    by up to new_tokens.
    """

    tokens: Tensor
    text: str
    prompts: Sequence[str] = ()
    new_tokens: int = 0


@dataclass(frozen=True)
class Figures:
    """A model's row. kl is None for the original; tokens_per_second where nothing decodes it."""

    name: str
    scheme: str | None
    sizes: Sizes
    bits_per_weight: float
    perplexity: float
    loss: Mean
    kl: Divergence | None
    tokens_per_second: float | None
    curves: Curves | None


@dataclass(frozen=True)
class Parting:
    """Where an answer leaves the original's: after so many tokens, the two tokens there, and
    KL(original || model) of that choice in nats.
    """

    after_tokens: int
    original_token: str
    token: str
    kl: float


@dataclass(frozen=True)
class Answer:
    """A model's greedy answer: as far as it is the original's, and the rest."""

    same: str
    rest: str
    tokens: int
    parting: Parting | None


@dataclass(frozen=True)
class Question:
    """A prompt, and the answers to it: the original's, then one per model."""

    prompt: str
    original: Answer
    answers: list[Answer]


@dataclass(frozen=True)
class Comparison:
    """All figures; noise_floor is the KL of the original in bfloat16 to itself in float32."""

    text: str
    windows: int
    context: int
    original: Figures
    noise_floor: Divergence
    models: list[Figures]
    questions: list[Question]


def shared_windows(
    text: HeldOut, original: Side, models: Sequence[Side], notice: Callable[[str], None]
) -> Tensor:
    """Windows [n, context] of a text that all sides can read. Raises DataError where a model's
    tokenizer reads the text otherwise than the original's: KL compares choices of the same tokens.
    """
    sides = (original, *models)
    longest = min((side.longest for side in sides if side.longest is not None), default=None)
    tokens = text.windows(original.tokenizer, longest, notice)
    for side in models:
        if not torch.equal(text.windows(side.tokenizer, longest, lambda said: None), tokens):
            raise DataError(
                f"{side.name} reads the text as other tokens than {original.name} does: they have "
                "different tokenizers, and no KL is defined between them"
            )
    return tokens


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a prompt: a user's message through the chat template, if there is one."""
    if not tokenizer.chat_template:
        ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
        return ids
    messages = [{"role": "user", "content": prompt}]
    try:
        chat: list[int] = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # templates raise what they like
        raise DataError(
            f"the model's chat template refuses the prompt {prompt!r}: {error}"
        ) from error
    return chat


def default_prompts(tokenizer: Any) -> tuple[str, ...]:
    """Questions for a chat model, beginnings for any other."""
    return QUESTIONS if tokenizer.chat_template else BEGINNINGS


def compare(
    original: Side,
    models: Sequence[Side],
    probe: Probe,
    progress: Callable[[str], Progress],
) -> Comparison:
    """Measure all models on a probe, one in memory at a time.

    The original computes in float32, and once more in bfloat16 for the noise floor. `progress` is
    asked with the name of each pass. Raises DataError for a model of another vocabulary, and
    SourceError for one whose logits cannot be followed.
    """
    prompts = [prompt_tokens(original.tokenizer, prompt) for prompt in probe.prompts]

    def recorded(side: Side, dtype: torch.dtype | None, ask: bool, what: str) -> Recording:
        asked = prompts if ask else ()
        model = side.load(dtype)
        return record(model, probe.tokens, asked, probe.new_tokens, progress(what))

    reference = recorded(original, torch.float32, True, f"{short(original.name)} in float32")
    low = recorded(original, torch.bfloat16, False, f"{short(original.name)} in bfloat16")
    floor = diverge(reference, low)
    del low
    rows, columns = [], []
    for side in models:
        recording = recorded(side, None, True, short(side.name))
        figures = diverge(reference, recording)
        columns.append(_answers(original.tokenizer, reference, recording))
        rows.append(_figures(side, figures.loss, Divergence.of(figures)))
        del recording
    questions = [
        Question(
            prompt,
            _whole(original.tokenizer, reference, number),
            [answers[number] for answers in columns],
        )
        for number, prompt in enumerate(probe.prompts)
    ]
    count, context = probe.tokens.shape
    return Comparison(
        probe.text,
        count,
        context,
        _figures(original, floor.original_loss, None),
        Divergence.of(floor),
        rows,
        questions,
    )


def _figures(side: Side, loss: Tensor, kl: Divergence | None) -> Figures:
    mean = Mean.of(loss)
    return Figures(
        side.name,
        side.scheme,
        side.sizes,
        side.sizes.bits_per_weight,
        math.exp(mean.value),
        mean,
        kl,
        side.speed(),
        side.curves,
    )


def _answers(tokenizer: Any, original: Recording, model: Recording) -> list[Answer]:
    """Every prompt's answer, cut where it leaves the original's."""
    found = []
    for number, continuation in enumerate(model.continuations):
        difference = first_difference(original, model, number)
        tokens, parting = continuation.tokens, None
        place = len(tokens)
        if difference is not None:
            place = difference.place
            chosen = (difference.original_token, difference.token)
            first, second = (tokenizer.decode([token]) for token in chosen)
            parting = Parting(place, first, second, difference.kl)
        found.append(Answer(*_split(tokenizer, tokens, place), len(tokens), parting))
    return found


def _whole(tokenizer: Any, recording: Recording, number: int) -> Answer:
    tokens = recording.continuations[number].tokens
    return Answer(*_split(tokenizer, tokens, len(tokens)), len(tokens), None)


def _split(tokenizer: Any, tokens: list[int], place: int) -> tuple[str, str]:
    """Text of the first tokens and of the rest, to which a character across the border belongs."""
    whole, same = (
        tokenizer.decode(part, skip_special_tokens=True) for part in (tokens, tokens[:place])
    )
    while not whole.startswith(same):
        same = same[:-1]
    return same, whole[len(same) :]
