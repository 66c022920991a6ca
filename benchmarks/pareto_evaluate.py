"""What a model of the Pareto table is measured by: one protocol, dense float32, on the CPU.

A reference is made of the original once: hidden states before the head (from which its logits are
exact, in a thousandth of their size), and its greedy continuations. Parts of a measurement:

wikitext2, c4: perplexity and KL(original || model) over the first windows of a text, all tokens but
  the first of a window; and llama.cpp's perplexity, over the second half of each window. WikiText-2
  is the test file as it stands, which is what llama-perplexity reads.
greedy: share of the original's greedy continuation that the model's own repeats before they differ.
  The model is shown the original's tokens; until it would choose another they are its own.
tasks: accuracy. ARC and PIQA by log-likelihood per byte of the answer, WinoGrande by that of the
  continuation after either option, LAMBADA if the whole word is what the model would choose.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from typing import Any, NamedTuple

import data
import torch
from torch import Tensor
from torch.nn import functional as F

from pvrt.tools.divergence import diverge
from pvrt.tools.perplexity import windows
from pvrt.tools.recording import Recording

TASKS = ("arc_easy", "arc_challenge", "piqa", "winogrande", "lambada_openai")
TEXTS = ("wikitext2", "c4")
PARTS = (*TEXTS, "greedy", "tasks")
BATCH = 1024  # tokens of a batch of task items


@dataclass(frozen=True)
class Settings:
    """How much is measured: windows of each text, items of each task, prompts and their tokens."""

    window: int = 2048
    windows: int = 3
    items: int = 100
    prompts: int = 32
    prompt: int = 64
    continued: int = 300

    def of(self, part: str) -> dict[str, int]:
        """What a part depends on."""
        wanted = {"greedy": ("prompts", "prompt", "continued"), "tasks": ("items",)}
        names = wanted.get(part, ("window", "windows"))
        return {name: value for name, value in asdict(self).items() if name in names}


# ---- texts ------------------------------------------------------------------------------------


def files(part: str) -> list[str]:
    """What a part reads of the data folder."""
    if part == "tasks":
        return [f"{data.TASKS}/{task}.jsonl" for task in TASKS]
    return [data.TEST if part == "wikitext2" else data.C4]


def tokens(part: str, tokenizer: Any, settings: Settings) -> Tensor:
    """Windows [n, window] of wikitext2 or c4; prompts [n, prompt] of greedy."""
    if part == "wikitext2":
        file = data.need(data.TEST).read_text(encoding="utf-8")
        return windows(file, tokenizer, settings.window, settings.windows)
    documents = data.documents(data.need(data.C4))  # which calibrate nothing here
    if part == "c4":
        return windows("\n\n".join(documents), tokenizer, settings.window, settings.windows)
    # From the end: other documents than the windows are of.
    ids = (tokenizer(text, verbose=False)["input_ids"] for text in reversed(documents))
    long = (row[: settings.prompt] for row in ids if len(row) >= settings.prompt)
    return torch.tensor(list(islice(long, settings.prompts)))


# ---- the reference ----------------------------------------------------------------------------


def hidden(model: Any, ids: Tensor, **given: Tensor) -> Tensor:
    """What goes into the head, [batch, tokens, width]."""
    states: Tensor = model.base_model(input_ids=ids, use_cache=False, **given).last_hidden_state
    return states


def head(model: Any, states: Tensor) -> Tensor:
    """Logits in float32."""
    logits: Tensor = model.get_output_embeddings()(states)
    return logits.float()


class Product:
    """A head that only multiplies, for `diverge`: all that is kept of the original's."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.vocabulary = weight, len(weight)

    def logits(self, states: Tensor) -> Tensor:
        """states [n, width] -> [n, vocabulary] float32."""
        return F.linear(states, self.weight).float()


def product(model: Any) -> Product:
    """A model's own, of the models whose head is one (see `reference`)."""
    return Product(model.get_output_embeddings().weight.detach())


@torch.inference_mode()
def reference(part: str, model: Any, tokenizer: Any, settings: Settings) -> dict[str, Tensor]:
    """What `measure` compares a part with, of the original in float32.

    Raises ValueError for a model whose logits are more than its head's product.
    """
    ids = tokens(part, tokenizer, settings)
    if part == "greedy":
        sequences = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=settings.continued,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return {"sequences": sequences}
    probe, own = ids[:1, :16], product(model)
    if not torch.allclose(own.logits(hidden(model, probe)), model(probe).logits, atol=1e-3):
        raise ValueError(f"{type(model).__name__} does more to its logits than multiply")
    states = torch.cat([hidden(model, row.unsqueeze(0)) for row in ids])
    return {"states": states, "head": own.weight}


# ---- parts ------------------------------------------------------------------------------------


@torch.inference_mode()
def text(model: Any, ids: Tensor, original: Tensor, weight: Tensor) -> dict[str, float]:
    """Perplexity and KL over windows [n, window]; `original` are its hidden states of them, and
    `weight` its head. Without a model the original's own.
    """

    def recording(own: Any, states: Tensor) -> Recording:
        return Recording(own, ids, states[:, :-1], [])

    theirs = ours = recording(Product(weight), original)
    if model is not None:
        states = torch.cat([hidden(model, row.unsqueeze(0)) for row in ids])
        ours = recording(product(model), states)
    found = diverge(theirs, ours)
    second = found.loss[:, ids.shape[1] // 2 - 1 :]
    return {
        "ppl": math.exp(found.loss.mean()),
        "ppl_second_half": math.exp(second.mean()),
        "kl": float(found.kl.mean()),
    }


@torch.inference_mode()
def greedy(model: Any, sequences: Tensor, prompt: int) -> float:
    """Mean share of the continuation, sequences[:, prompt:], that is repeated before a difference.

    Looks at more and more of it, for those prompts alone that did not differ yet.
    """
    total, alive, seen, share = sequences.shape[1], sequences, prompt, 0.0
    while len(alive) and seen < total:
        until = min(prompt + 2 * (seen - prompt) + 16, total)
        kept = []
        for row in alive:
            states = hidden(model, row[: until - 1].unsqueeze(0))[0, seen - 1 :]
            equal = (head(model, states).argmax(-1) == row[seen:until]).tolist()
            repeated = sum(takewhile(bool, equal))
            share += repeated
            if repeated == until - seen:
                kept.append(row)
        alive, seen = torch.stack(kept) if kept else alive[:0], until
    return share / (len(sequences) * (total - prompt))


class Answer(NamedTuple):
    """A sequence whose tokens from `first` on are scored; bytes of their text."""

    ids: list[int]
    first: int
    size: int


class Item(NamedTuple):
    """Answers of which number `gold` is right; with one answer, whether it would be chosen."""

    answers: list[Answer]
    gold: int


def items(task: str, tokenizer: Any, count: int) -> list[Item]:
    """The first items of a task's file."""
    lines = data.need(f"{data.TASKS}/{task}.jsonl").read_text(encoding="utf-8").splitlines()

    def answer(context: str, continuation: str) -> Answer:
        first = len(tokenizer(context, verbose=False)["input_ids"])
        ids = tokenizer(f"{context} {continuation}", verbose=False)["input_ids"]
        return Answer(ids, first, len(continuation.encode()))

    def item(row: dict[str, Any]) -> Item:
        if "context_options" in row:
            pairs = [(context, row["continuation"]) for context in row["context_options"]]
        elif "choices" in row:
            context = f"{row['query'].strip()}\nAnswer:"
            pairs = [(context, choice) for choice in row["choices"]]
        else:
            pairs = [(row["context"], row["continuation"])]
        return Item([answer(*pair) for pair in pairs], row.get("gold", 0))

    return [item(json.loads(line)) for line in lines[:count]]


class Packed(NamedTuple):
    """An item's answers as one sequence: what they share, once, then the rest of each.

    ids, positions [tokens]; visible [tokens, tokens]; predictors and targets per answer: which
    tokens' logits foretell which token.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    predictors: list[list[int]]
    targets: list[list[int]]


def pack(item: Item) -> Packed:
    """One sequence of which every answer sees its own part alone."""
    rows = [answer.ids[:-1] for answer in item.answers]  # nothing follows the last token
    shared = sum(1 for _ in takewhile(lambda same: len(set(same)) == 1, zip(*rows, strict=False)))
    ids, positions = rows[0][:shared], list(range(shared))
    spans, predictors = [], []
    for row, answer in zip(rows, item.answers, strict=True):
        start = len(ids)
        spans.append(slice(start, start + len(row) - shared))
        places = (position - 1 for position in range(answer.first, len(answer.ids)))
        predictors.append([p if p < shared else start + p - shared for p in places])
        ids = ids + row[shared:]
        positions += range(shared, len(row))
    visible = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    visible[:, :shared] = True
    for span in spans:
        visible[span, span] = True
    visible &= torch.ones_like(visible).tril()
    targets = [answer.ids[answer.first :] for answer in item.answers]
    return Packed(torch.tensor(ids), torch.tensor(positions), visible, predictors, targets)


def batches(packed: Sequence[Packed]) -> Iterator[list[int]]:
    """Numbers of sequences of about one length, at most BATCH tokens or one sequence."""
    batch: list[int] = []
    for number in sorted(range(len(packed)), key=lambda each: len(packed[each].ids)):
        if batch and (len(batch) + 1) * len(packed[number].ids) > BATCH:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@torch.inference_mode()
def log_probabilities(model: Any, packed: list[Packed]) -> list[list[tuple[float, bool]]]:
    """Per item and answer: the log-likelihood, and whether every token would be chosen.

    Raises ValueError where a model with a sliding window would not see a whole item.
    """
    sliding = getattr(model.config, "sliding_window", None)
    if sliding and any(len(each.ids) > sliding for each in packed):
        raise ValueError(f"an item is longer than the model's sliding window of {sliding} tokens")
    found: list[list[tuple[float, bool]]] = [[] for _ in packed]
    for batch in batches(packed):
        length = len(packed[batch[-1]].ids)
        ids = torch.zeros(len(batch), length, dtype=torch.int64)
        positions = torch.zeros_like(ids)
        visible = torch.eye(length, dtype=torch.bool).repeat(len(batch), 1, 1, 1)
        for row, each in enumerate(packed[number] for number in batch):
            size = len(each.ids)
            ids[row, :size], positions[row, :size] = each.ids, each.positions
            visible[row, 0, :size, :size] = each.visible
        states = hidden(model, ids, attention_mask=visible, position_ids=positions)
        for row, number in enumerate(batch):
            each = packed[number]
            for places, targets in zip(each.predictors, each.targets, strict=True):
                logits = head(model, states[row, places]).log_softmax(-1)
                wanted = torch.tensor(targets)
                total = float(logits.gather(1, wanted.unsqueeze(1)).sum())
                found[number].append((total, bool((logits.argmax(-1) == wanted).all())))
    return found


def accuracy(task: list[Item], scores: list[list[tuple[float, bool]]]) -> float:
    """Share of right answers."""
    right = 0
    for item, found in zip(task, scores, strict=True):
        if len(found) == 1:
            right += found[0][1]
            continue
        likelihoods = [
            total / answer.size for (total, _), answer in zip(found, item.answers, strict=True)
        ]
        right += likelihoods.index(max(likelihoods)) == item.gold
    return right / len(task)


def measure(
    part: str, model: Any, tokenizer: Any, original: dict[str, Tensor], settings: Settings
) -> dict[str, Any]:
    """One part of a model's row, against the part's reference of the same settings.

    Without a model the original's own, of the texts alone.
    """
    if part == "greedy":
        return {"equal": greedy(model, original["sequences"], settings.prompt)}
    if part == "tasks":
        tasks = {name: items(name, tokenizer, settings.items) for name in TASKS}
        return {
            name: accuracy(task, log_probabilities(model, [pack(item) for item in task]))
            for name, task in tasks.items()
        }
    return text(model, tokens(part, tokenizer, settings), original["states"], original["head"])
