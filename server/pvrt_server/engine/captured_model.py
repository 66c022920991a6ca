"""Models of transformers on a GPU: prompts as they are, each step one replay of a CUDA graph.

A token passes hundreds of kernels of some microseconds each, and transformers' Python takes ten
times as long to launch them. A graph launches them all at once, but its tensors stay where they
are: keys and values of the sequences that decode lie in the rows of buffers, and what changes from
token to token, ids and positions, is read from the GPU. There is a graph for every number of
sequences and every capacity that is met, both rounded up to powers of two.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

from pvrt.kv_cache import cache_name
from pvrt_server.engine.cuda_graphs import Recorder
from pvrt_server.engine.models import NO_BATCH, Kept, Sequenced, TransformersModel

_FIRST_CAPACITY = 256
_ATTENTION = "pvrt_one_query"
_log = logging.getLogger("pvrt_server")


class _NotCaptured(Exception):
    """Why a model's step cannot be a graph."""


class CapturedModel(TransformersModel):
    """A model whose step is recorded by `record` where that is possible.

    Buffers for at most `room` tokens are kept for the next use, beside those that are in use.
    """

    def __init__(self, model: Any, record: Recorder, room: int) -> None:
        super().__init__(model)
        self._record = record
        self._room = room
        self._graphs: dict[tuple[int, int], _Graph] = {}  # the one used last at the end
        self._norms = _plain_norms(model)
        self._limit = math.inf  # of rows times capacity; what is larger is not recorded

    def step(
        self, states: Sequence[Sequenced], tokens: Sequence[int], argmax_only: bool = False
    ) -> Tensor:
        """See LanguageModel."""
        graph = self._graph_for(states)
        if graph is None:
            return super().step(states, tokens, argmax_only)
        self._gather(states, graph)
        self._batch = NO_BATCH  # an error leaves none
        logits = graph.run(states, tokens)
        self._batch = graph
        for state in states:
            state.length += 1
        return logits

    def _graph_for(self, states: Sequence[Sequenced]) -> "_Graph | None":
        """The graph of a step, recorded if it is new; None where there can be none."""
        rows = 1 << (len(states) - 1).bit_length()
        longest = max(state.length for state in states)
        capacity = max(_FIRST_CAPACITY, 1 << longest.bit_length())
        if rows * capacity >= self._limit or not all(state.length for state in states):
            return None
        graph = self._graphs.pop((rows, capacity), None) or self._recorded(states, rows, capacity)
        if graph is not None:
            self._graphs[rows, capacity] = graph
        return graph

    def _recorded(self, states: Sequence[Sequenced], rows: int, capacity: int) -> "_Graph | None":
        """A new graph; None, and a line in the log, where it cannot be or there is no memory."""
        try:
            self._check(states)
            graph = _Graph(self.model, rows, capacity, self._kept(states[0], 1))
            with _one_query_attention(self.model), _fused(self._norms):
                graph.record(self._record)
            return graph
        except torch.OutOfMemoryError as error:
            reason, limit = str(error), rows * capacity
        except Exception as error:
            reason, limit = str(error), 0
        if limit and self._graphs:  # whose buffers are in the way
            self._graphs.clear()
            return self._recorded(states, rows, capacity)
        self._limit = limit
        what = f"{rows} x {capacity} tokens" if limit else "tokens"
        _log.warning("%s are decoded without a CUDA graph: %s", what, reason)
        return None

    def _check(self, states: Sequence[Sequenced]) -> None:
        """Raise _NotCaptured for a model that is known not to run from tensors alone."""
        kind, attention = type(self.model), self.model.config.get_text_config()._attn_implementation
        if not all(self._is_plain(state) for state in states):
            raise _NotCaptured("its layers keep sliding windows or recurrent states")
        if not getattr(kind, "_can_compile_fullgraph", False):
            raise _NotCaptured(
                f"transformers does not run {kind.__name__} without Python's choices"
            )
        if attention != "sdpa":
            raise _NotCaptured(f"its attention is {attention}, not sdpa")

    def _gather(self, states: Sequence[Sequenced], graph: "_Graph") -> None:
        """Have these sequences in the rows of a graph, and no others in a batch."""
        if self._batch is graph and set(graph.members) == set(states):
            return
        leaving = [state for state in self._batch.members if state not in states]
        self._unstack(leaving)
        graph.free(leaving if self._batch is graph else graph.members)
        there = graph.members
        for state in states:
            if state not in there:
                graph.place(state, self._kept(state, state.length))
        for state in states:
            state.cache = None
        self._batch = graph
        *others, _ = self._graphs
        while sum(map(math.prod, others)) > self._room:
            del self._graphs[others.pop(0)]


class _Graph:
    """One token of each of some sequences, computed from tensors that stay in place."""

    def __init__(self, model: Any, rows: int, capacity: int, like: Kept) -> None:
        """like: keys and values of which every layer's buffers take heads, width and type."""
        self._model = model
        self._layers = [
            _Layer(*(x.new_zeros(rows, x.shape[1], capacity, x.shape[3]) for x in pair))
            for pair in like
        ]
        device = like[0][0].device
        self._inputs = torch.zeros(2, rows, dtype=torch.long, device=device)  # tokens, positions
        self._places = torch.arange(capacity, device=device)
        self._open = torch.zeros(capacity, dtype=like[0][0].dtype, device=device)
        self._rows: list[Sequenced | None] = [None] * rows

    @property
    def members(self) -> Sequence[Sequenced]:
        """See Batch."""
        return [state for state in self._rows if state is not None]

    def kept(self, state: Sequenced, length: int) -> Kept:
        """See Batch."""
        row = self._rows.index(state)
        part = slice(row, row + 1), slice(None), slice(length)
        return [(layer.keys[part], layer.values[part]) for layer in self._layers]

    def place(self, state: Sequenced, kept: Kept) -> None:
        """Copy a sequence's keys and values into a free row."""
        row = self._rows.index(None)
        self._rows[row] = state
        for layer, pair in zip(self._layers, kept, strict=True):
            for buffer, tensor in zip((layer.keys, layer.values), pair, strict=True):
                buffer[row, :, : state.length] = tensor[0]
                # What others left there may be infinite, which no mask hides.
                buffer[row, :, state.length :] = 0

    def free(self, states: Sequence[Sequenced]) -> None:
        """These sequences leave their rows."""
        self._rows = [None if state in states else state for state in self._rows]

    def record(self, record: Recorder) -> None:
        """Before any sequence is placed: free rows are written to, at their first place."""
        self._replay = record(self._compute)

    def run(self, states: Sequence[Sequenced], tokens: Sequence[int]) -> Tensor:
        """Append a token to each of the sequences placed here: logits [n, V]."""
        rows = [self._rows.index(state) for state in states]
        inputs = [[0] * len(self._rows), [0] * len(self._rows)]
        for row, state, token in zip(rows, states, tokens, strict=True):
            inputs[0][row], inputs[1][row] = token, state.length
        self._inputs.copy_(torch.tensor(inputs))
        logits = self._replay()
        in_order = rows == list(range(len(rows)))
        return logits[: len(rows)] if in_order else logits[torch.tensor(rows, device=logits.device)]

    def _compute(self) -> Tensor:
        tokens, positions = self._inputs[:, :, None]
        for layer in self._layers:
            layer.positions = positions
        mask = self._open.masked_fill(self._places > positions, -math.inf)
        output = self._model(
            input_ids=tokens,
            attention_mask=mask[:, None, None],
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{cache_name(): Cache(layers=self._layers)},
        )
        logits: Tensor = output.logits[:, 0]
        return logits.float()


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """Buffers [rows, heads, capacity, dim] of one layer; a row's next place is on the GPU."""

    positions: Tensor  # [rows, 1]

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer.scatter_(2, self.positions[:, None, None].expand_as(new), new)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        raise _NotCaptured("it asks for the length of a sequence in Python")


@contextmanager
def _one_query_attention(model: Any) -> Iterator[None]:
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one query [n, heads, 1, dim] over buffers [n, kv_heads, capacity, dim].

    Heads that share keys are taken as queries of one head: those of transformers copy the buffers.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise _NotCaptured(f"its attention has {name}")
    count, heads, _, width = query.shape
    grouped = query.reshape(count, key.shape[1], -1, width)
    y = F.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return y.reshape(count, 1, heads, value.shape[-1]), None


AttentionInterface.register(_ATTENTION, _attend)


def _fused_norm(module: Any) -> Callable[[Tensor], Tensor]:
    shape, weight, epsilon = module.weight.shape, module.weight, module.variance_epsilon
    return lambda x: F.rms_norm(x, shape, weight, epsilon)


@torch.inference_mode()
def _plain_norms(model: Any) -> list[Any]:
    """The modules that are torch's own RMS norm but for rounding, found by trying."""
    found = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not hasattr(module, "variance_epsilon") or not isinstance(weight, Tensor):
            continue
        if "forward" in vars(module):  # others have put something in between
            continue
        x = torch.linspace(-2, 3, 2 * len(weight)).to(weight).view(2, -1)
        ours, theirs = _fused_norm(module)(x).float(), module(x).float()
        if (ours - theirs).norm() <= 4 * torch.finfo(weight.dtype).eps * theirs.norm():
            found.append(module)
    return found


@contextmanager
def _fused(norms: list[Any]) -> Iterator[None]:
    """These norms as one kernel each, where transformers has eight: a third of all of a layer."""
    for module in norms:
        module.forward = _fused_norm(module)
    try:
        yield
    finally:
        for module in norms:
            del module.forward
