"""Distillation to the original model's logits, without ever holding them whole.

The loss is KL(original || student) over the full vocabulary, mean over tokens (arXiv 2405.14852,
section 4). Logits of one token are vocabulary wide; the hidden state that they come from is tiny.
So the original's final hidden states are what is kept (exact, and smaller than any useful top-k of
logits), and both models' logits exist for one chunk of tokens at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvrt.errors import RunError
from pvrt.modules.aqlm_embedding import TiedHead
from pvrt.modules.aqlm_layer import AQLMLayer
from pvrt_kernels import aqlm_dequantize
from pvrt_tune import parallel
from pvrt_tune.data.text import CalibrationData
from pvrt_tune.settings import Recipe
from pvrt_tune.shapes import ModelShape, TableShape
from pvrt_tune.store import unseen

#: Of logits, as if in float32: of those that a head computes at once, and of those that are made
#: into a loss at once, which should stay in a processor's cache.
CHUNK_BYTES, SLICE_BYTES = 64 << 20, 2 << 20
#: Windows whose states of the original model are computed and kept together.
TEACHER_CHUNK = 16
#: Windows of these that the original model computes at once.
_TOGETHER = 4


@dataclass(frozen=True)
class Head:
    """The output head: logits = cap * tanh(multiplier * (h W^T + b) / cap), where there is a cap.

    weight [vocabulary, width], bias [vocabulary] or None. gradient [vocabulary, width] float32 or
    None: what gradients of a decoded weight are added to.
    """

    weight: Tensor
    bias: Tensor | None
    multiplier: float
    cap: float | None
    gradient: Tensor | None = None

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype | None = None) -> "Head":
        """The head of a causal language model, as its config describes it.

        One in codes is decoded into a weight without gradients, in `dtype` or its own type.
        """
        linear, config = model.get_output_embeddings(), model.config.get_text_config()
        multiplier = getattr(config, "logit_scale", None) or 1.0
        multiplier /= getattr(config, "logits_scaling", None) or 1.0
        cap = getattr(config, "final_logit_softcapping", None)
        table = table_of(linear)
        weight = linear.weight if table is None else decoded(table, dtype)
        return cls(weight, linear.bias, float(multiplier), cap)

    def to(self, dtype: torch.dtype) -> "Head":
        """The head with its weight in a type, without gradients."""
        return replace(self, weight=self.weight.detach().to(dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, width] -> [n, vocabulary] in float32."""
        return self.bounded(self.product(hidden))

    def product(self, hidden: Tensor) -> Tensor:
        """hidden [n, width] -> h W^T + b [n, vocabulary] in the dtype of hidden."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return F.linear(hidden, self.weight.to(hidden.dtype), bias)

    def bounded(self, product: Tensor) -> Tensor:
        """h W^T + b -> logits in float32."""
        raw = product.float()
        raw = raw if self.multiplier == 1.0 else raw * self.multiplier
        return raw if self.cap is None else torch.tanh(raw / self.cap) * self.cap

    def pull_back(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient by logits -> gradient by h W^T + b, in place."""
        if self.cap is not None:
            grad.mul_(1 - (logits / self.cap).square())
        return grad if self.multiplier == 1.0 else grad.mul_(self.multiplier)


def table_of(head: nn.Module) -> AQLMLayer | None:
    """What an output head in codes multiplies by; None for a dense one."""
    layer = head.embedding if isinstance(head, TiedHead) else head
    return layer if isinstance(layer, AQLMLayer) and layer.packed is None else None


def decoded(table: AQLMLayer, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of a table in codes, without gradients, decoded a part at a time."""
    dtype, codes = dtype or table.codebooks.dtype, table.codes
    shape = table.out_features, table.in_features
    weight = torch.empty(shape, dtype=dtype, device=codes.device)
    with torch.no_grad():
        for rows in _slices(*shape):
            weight[rows] = _part(table, rows)
    return weight


def pull_back(table: AQLMLayer, grad: Tensor) -> None:
    """Add the gradient [vocabulary, width] of a decoded table to its codebooks and scales."""
    for rows in _slices(table.out_features, table.in_features):
        _part(table, rows).backward(grad[rows])  # type: ignore[no-untyped-call]


def _part(table: AQLMLayer, rows: slice) -> Tensor:
    weight = aqlm_dequantize(table.codes[rows], table.codebooks, table.scales[rows])
    return weight if table.in_scales is None else weight * table.in_scales


def _slices(count: int, width: int, most: int = CHUNK_BYTES) -> Iterator[slice]:
    """Slices of `count` rows of `width` numbers, each of at most so many bytes in float32."""
    step = max(1, most // (4 * width))
    return (slice(start, start + step) for start in range(0, count, step))


def head_bytes(head: TableShape, itemsize: int) -> int:
    """Peak of an output head in codes at work, decoded with `itemsize` bytes a number: with its
    gradient, and parts that are decoded and pulled back.
    """
    return (itemsize + 4) * head.weights + 4 * min(CHUNK_BYTES, 4 * head.weights)


def final_hidden(model: Any, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """What enters the output head: [batch, length, width] for tokens [batch, length].

    `positions` [batch, length] that start again at 0 keep packed documents from seeing each other.
    """
    hidden: Tensor = model.base_model(
        input_ids=tokens, position_ids=positions, use_cache=False
    ).last_hidden_state
    return hidden


def on_device(data: CalibrationData, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Tokens and positions, as `final_hidden` takes them."""
    positions = None if data.positions is None else data.positions.to(device)
    return data.tokens.to(device), positions


def check_head(model: Any, tokens: Tensor, *, separate_documents: bool = False) -> None:
    """Raise RunError unless `Head` and `final_hidden` reproduce the model's logits on tokens [1, n]
    and, if documents are to be separate, do so for each of two packed documents.
    """
    with torch.no_grad():
        ours = Head.of(model).logits(final_hidden(model, tokens))
        theirs = model(tokens, use_cache=False).logits.float()
    spread = float((ours - theirs).abs().max() / theirs.std().clamp_min(1e-30))
    if not spread < 0.1:
        raise RunError(
            f"{type(model).__name__} computes its logits in a way that distillation cannot follow; "
            "leave PV-Tuning out with --no-pv"
        )
    if separate_documents and not _separates(model, tokens):
        raise RunError(
            f"{type(model).__name__} lets packed documents see each other; leave "
            "separate_documents out of the recipe"
        )


def _separates(model: Any, tokens: Tensor) -> bool:
    """Whether a document comes out alike alone and behind another one in its window."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    packed = torch.cat([tokens.flip(1), tokens], 1)
    with torch.no_grad():
        alone = final_hidden(model, tokens).float()
        behind = final_hidden(model, packed, torch.cat([positions, positions], 1)).float()
    difference = (behind[:, tokens.shape[1] :] - alone).abs().max()
    return bool(difference < 0.1 * alone.std())


class _ChunkedKL(torch.autograd.Function):
    """Mean KL with gradients taken chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        heads: tuple[Head, Head],
        target: Tensor,
        factor: float,
    ) -> Tensor:
        """hidden, target [n, width], and heads of their type; `weight` is what the gradient of the
        student's is for.
        """
        head, target_head = heads
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        trains = wants_hidden or wants_weight or head.gradient is not None
        total = hidden.new_zeros((), dtype=torch.float64)
        for part in _slices(len(hidden), len(weight)):
            # The student's product becomes the gradient by itself, a slice at a time.
            product, aim = head.product(hidden[part]), target_head.product(target[part])
            for rows in _slices(len(product), len(weight), SLICE_BYTES):
                logits = head.bounded(product[rows])
                given = F.log_softmax(logits, -1)
                wanted = F.log_softmax(target_head.bounded(aim[rows]), -1)
                chance = wanted.exp()
                total += torch.dot(chance.flatten(), wanted.sub_(given).flatten())
                if trains:
                    grad = given.exp_().sub_(chance).div_(len(hidden))
                    product[rows] = head.pull_back(grad, logits)
            if grad_hidden is not None:
                torch.mm(product, head.weight, out=grad_hidden[part])
            if head.gradient is not None:
                _add_product(head.gradient, product, hidden[part], factor)
            if grad_weight is not None:
                _add_product(grad_weight, product, hidden[part])
        ctx.grads = grad_hidden, grad_weight
        return (total / len(hidden)).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what the forward pass kept, in place, and let go of it: it is asked for once."""
        kept, ctx.grads = ctx.grads, None
        scaled = (None if grad is None else grad.mul_(grads[0]) for grad in kept)
        return (*scaled, None, None, None)


def _add_product(gradient: Tensor, grad: Tensor, hidden: Tensor, factor: float = 1.0) -> None:
    """gradient [vocabulary, width] += factor grad^T hidden, a product in the type of these two."""
    for rows in _slices(*gradient.shape):
        gradient[rows].add_(grad[:, rows].T @ hidden, alpha=factor)


def kl_loss(
    hidden: Tensor, head: Head, target: Tensor, target_head: Head, factor: float = 1.0
) -> Tensor:
    """KL(original || student) in nats, mean over tokens; differentiable by hidden and head weight.

    hidden [n, width] and `head` of the student; target [n, width'] and `target_head` of the
    original, used in the dtype of hidden. Memory: two chunks of at most 64 MiB of logits. The
    gradient of a decoded weight, times `factor`, is added to `head.gradient` here and now.
    """
    dtype = hidden.dtype
    heads = head.to(dtype), target_head.to(dtype)
    loss: Tensor = _ChunkedKL.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, heads, target.to(dtype), factor
    )
    return loss


def kl_bytes(model: ModelShape, tokens: int, itemsize: int) -> int:
    """Peak of `kl_loss` for hidden states [tokens, width] of `itemsize` bytes a number, without
    the gradient of the head's weight.
    """
    rows = min(tokens, max(1, CHUNK_BYTES // (4 * model.vocabulary)))
    # Of a chunk both models' products, and of a slice of them, in float32: log-probabilities of
    # both models, chances, and one's logits. Of all tokens: targets, and hidden states' gradient.
    chunk = 2 * itemsize * rows * model.vocabulary
    chunk += 4 * min(SLICE_BYTES, 4 * rows * model.vocabulary)
    return chunk + 2 * itemsize * tokens * model.width


class Teacher:
    """Final hidden states of the original model, computed once per window of `data` and kept.

    Windows are handled in chunks of `chunk`, and as many chunks at once as there are ranks, one on
    each. `load(chunk number)` may return what an earlier run or another rank kept. `save(chunk
    number, states)` is called on every rank, and is to keep the states, which are None where that
    chunk was kept before; when it returns, all ranks can load what any saved.
    """

    def __init__(
        self,
        model: nn.Module,
        data: CalibrationData,
        chunk: int,
        load: Callable[[int], Tensor | None],
        save: Callable[[int, Tensor | None], None],
    ) -> None:
        self.model: nn.Module | None = model
        self.data, self.chunk = data, chunk
        self.load, self.save = load, save
        self.chunks: dict[int, Tensor] = {}
        self.rounds: set[int] = set()
        self.head = Head.of(model)

    def prepare(self, numbers: Iterable[int]) -> None:
        """Have the states of windows by number ready, the same numbers on every rank."""
        for index in sorted({n // self._windows_per_round for n in numbers} - self.rounds):
            self._round(index)

    def hidden(self, numbers: list[int]) -> Tensor:
        """States [n, length, width] of windows by number, which are ready.

        Raises RunError when what another rank kept cannot be read here.
        """
        return torch.stack([self._kept(n // self.chunk)[n % self.chunk] for n in numbers])

    def finish(self, progress: Callable[[int, int], None]) -> None:
        """Compute all states that are not kept yet, then let go of the model (but for its head).

        `progress(done, total)` counts windows. Raises KeyboardInterrupt like `stop_if_asked`.
        """
        self.head = replace(self.head, weight=self.head.weight.clone())
        for first in range(0, len(self.data), self._windows_per_round):
            parallel.stop_if_asked()
            self.prepare([first])
            progress(min(first + self._windows_per_round, len(self.data)), len(self.data))
        self.model = None

    @property
    def _windows_per_round(self) -> int:
        return self.chunk * parallel.world()

    def _round(self, index: int) -> None:
        """Have one chunk per rank kept."""
        number = index * parallel.world() + parallel.rank()
        part = self.data[number * self.chunk : (number + 1) * self.chunk]
        states, made = self.load(number) if len(part) else None, None
        if len(part) and states is None:
            states = made = self._compute(part)
        self.save(number, made)
        if made is not None:
            # What was kept is mapped from its file: its pages can go, computed ones cannot.
            kept = self.load(number)
            states = made if kept is None else kept
        if states is not None:
            self.chunks[number] = states
        self.rounds.add(index)

    def _kept(self, number: int) -> Tensor:
        if number not in self.chunks:
            states = self.load(number)
            if states is None:
                raise unseen()
            self.chunks[number] = states
        return self.chunks[number]

    def _compute(self, data: CalibrationData) -> Tensor:
        assert self.model is not None, "finish() computes every chunk before it drops the model"
        device = next(self.model.parameters()).device
        parts = []
        with torch.no_grad():
            for first in range(0, len(data), _TOGETHER):
                part = data[first : first + _TOGETHER]
                states = final_hidden(self.model, *on_device(part, device))
                parts.append(states.to(torch.bfloat16).cpu())
        return torch.cat(parts)


def teacher_bytes(model: ModelShape, length: int, itemsize: int, original: int) -> int:
    """Peak of a teacher at work on the device; windows of `length`. With it are as many numbers of
    the original model.
    """
    # Hidden states that come in, as normed, the residual, and the last windows'; the outputs of the
    # widest sibling layers, and what is made of them.
    states = 4 * model.width + 1.5 * max(block.widest for block in model.blocks)
    return itemsize * (original + int(_TOGETHER * length * states))


def head_weights(model: ModelShape) -> int:
    """Numbers that a teacher keeps when it is done."""
    return model.vocabulary * model.width


def passes(recipe: Recipe) -> int:
    """How often a teacher runs the original model."""
    return -(-windows_seen(recipe) // _TOGETHER)


def windows_seen(recipe: Recipe) -> int:
    """Windows whose states a run computes: all, or those that its steps ask for."""
    settings = recipe.training
    assert settings is not None
    asked = settings.steps * settings.batch + settings.held_out
    return recipe.windows if settings.teacher_first else min(recipe.windows, asked)


def states_bytes(model: ModelShape, recipe: Recipe) -> tuple[int, int]:
    """Host memory of the chunk that a teacher computes, and bytes of all states that it keeps."""
    windows, one = windows_seen(recipe), 2 * recipe.length * model.width
    # A chunk's parts are joined; other chunks are mapped from their files.
    return 2 * one * min(TEACHER_CHUNK, windows), one * windows
