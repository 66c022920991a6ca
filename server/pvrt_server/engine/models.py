"""What the engine runs: any causal language model of transformers, behind one small interface."""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pvrt.kv_cache import cache_name
from pvrt.modules.whole_model import quantized_layers

_log = logging.getLogger("pvrt_server")


class State(Protocol):
    """What a model keeps of one sequence: keys and values of its first `length` tokens."""

    length: int


class LanguageModel(Protocol):
    """Tokens in, logits [n, V] in float32 out. The caller holds torch.inference_mode.

    Logits may be overwritten by the next call. After an error in `read` or `step` the states that
    were given to it are lost.
    """

    device: torch.device
    dtype: torch.dtype
    generation_config: Any
    weight_bytes: int  # that are held
    bytes_per_token: int  # of weights that greedy decoding reads

    def start(self) -> Any:
        """The state of a new sequence."""

    def read(self, state: Any, tokens: Sequence[int], keep: int) -> Tensor:
        """Append tokens to a sequence: logits [keep, V] after the last `keep` >= 1 of them."""

    def step(
        self, states: Sequence[Any], tokens: Sequence[int], argmax_only: bool = False
    ) -> Tensor:
        """Append one token to each of several sequences: logits, one row per sequence.

        With argmax_only a model may save work: the largest logit is right, and no other reaches it.
        """

    def copy(self, state: Any, length: int) -> Any | None:
        """A new state with the first `length` >= 1 tokens of another; None where that cannot be."""


def weight_bytes(model: Any) -> int:
    """What the weights of a model take, tied and packed ones counted once."""
    packed = {id(m.packed): m.packed for m in quantized_layers(model).values() if m.packed}
    tensors = [tensor for layers in packed.values() for tensor in layers.weight.tensors]
    return sum(tensor.nbytes for tensor in [*model.parameters(), *tensors])


#: Keys and values [1, heads, tokens, dim] of a sequence, by layer.
Kept = list[tuple[Tensor, Tensor]]


@dataclass(eq=False)
class Sequenced:
    """One sequence of a model of transformers."""

    cache: Any  # of transformers; None while the sequence is part of a batch
    length: int = 0


class Batch(Protocol):
    """Sequences whose keys and values are together; they have no caches of their own."""

    @property
    def members(self) -> Sequence[Sequenced]:
        """The sequences."""

    def kept(self, state: Sequenced, length: int) -> Kept:
        """Views of the first keys and values of a member."""


@dataclass(frozen=True)
class _Stacked:
    """Shorter sequences are padded at the beginning."""

    members: tuple[Sequenced, ...]
    cache: Any

    def kept(self, state: Sequenced, length: int) -> Kept:
        """See Batch."""
        row = self.members.index(state)
        first = max(member.length for member in self.members) - state.length
        return _part(self.cache, row, slice(first, first + length))


NO_BATCH = _Stacked((), None)


def _part(cache: Any, row: int, places: slice) -> Kept:
    part = slice(row, row + 1), slice(None), places
    return [(layer.keys[part], layer.values[part]) for layer in cache.layers]


#: Names of the cache among the arguments of models without attention.
_STATES = ("cache_params", "state")
_UNREAD = ()  # in the place of a cache that the model makes itself


def _cache_argument(model: Any) -> str | None:
    """Name of a model's cache among its arguments; None where it takes none."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in (cache_name(), *_STATES) if name in known), None)


class TransformersModel:
    """A model of transformers as it is.

    Some make a cache of their own kind at the first token. Of those without any, sequences are read
    anew for every token.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.generation_config = model.generation_config
        self.weight_bytes = self.bytes_per_token = weight_bytes(model)
        if not getattr(model.config, "tie_word_embeddings", False):
            self.bytes_per_token -= weight_bytes(model.get_input_embeddings())
        self._batch: Batch = NO_BATCH
        self._argument = _cache_argument(model)
        self._makes_cache = not model._supports_default_dynamic_cache()
        if self._argument is None:
            _log.warning(
                "%s keeps nothing of what it has read: every token reads all before it again",
                type(model).__name__,
            )

    def start(self) -> Sequenced:
        """See LanguageModel."""
        # DynamicCache, not StaticCache: on CPU attention over a preallocated 2048 tokens costs
        # 180 ms per token for SmolLM2-135M where this costs 48 (float32, 2 cores).
        own = self._makes_cache or self._argument is None
        return Sequenced(_UNREAD if own else DynamicCache(config=self.model.config))

    def read(self, state: Sequenced, tokens: Sequence[int], keep: int) -> Tensor:
        """See LanguageModel."""
        if state.cache is None:
            self._disband()
        if self._argument is None:
            output = self._read_anew(state, tokens)
        else:
            output = self.model(
                input_ids=torch.tensor([tokens], device=self.device),
                use_cache=True,
                logits_to_keep=keep,
                **{self._argument: None if state.cache is _UNREAD else state.cache},
            )
            if not hasattr(output, self._argument):  # layers keep states of one sequence alone
                self._argument = None
                output = self._read_anew(state, tokens)
            elif self._makes_cache:
                state.cache = getattr(output, self._argument)
        state.length += len(tokens)
        logits: Tensor = output.logits[0, -keep:]
        return logits.float()

    def _read_anew(self, state: Sequenced, tokens: Sequence[int]) -> Any:
        """The model's output for a whole sequence; its tokens are in the place of a cache."""
        before = state.cache if isinstance(state.cache, tuple) else ()
        state.cache = (*before, *tokens)
        whole = torch.tensor([state.cache], device=self.device)
        return self.model(input_ids=whole, use_cache=False)

    def step(
        self, states: Sequence[Sequenced], tokens: Sequence[int], argmax_only: bool = False
    ) -> Tensor:
        """See LanguageModel."""
        if not all(self._is_plain(state) for state in states) or len(states) == 1:
            pairs = zip(states, tokens, strict=True)
            return torch.cat([self.read(state, (token,), 1) for state, token in pairs])
        batch = self._batch
        if not isinstance(batch, _Stacked) or batch.members != tuple(states):
            batch = self._stack(tuple(states))
        self._batch = NO_BATCH  # an error leaves none
        lengths = torch.tensor([state.length for state in states], device=self.device)
        places = torch.arange(int(lengths.max()) + 1, device=self.device)
        output = self.model(
            input_ids=torch.tensor(tokens, device=self.device)[:, None],
            attention_mask=(places >= lengths.max() - lengths[:, None]).long(),
            position_ids=lengths[:, None],
            use_cache=True,
            logits_to_keep=1,
            **{cache_name(): batch.cache},
        )
        self._batch = batch
        for state in states:
            state.length += 1
        logits: Tensor = output.logits[:, 0]
        return logits.float()

    def copy(self, state: Sequenced, length: int) -> Sequenced | None:
        """See LanguageModel."""
        if not self._is_plain(state):
            return None  # windows and recurrent states have forgotten what came before
        return Sequenced(self._cache(self._kept(state, length)), length)

    def _is_plain(self, state: Sequenced) -> bool:
        """Whether keys and values of all tokens are kept, and nothing else; batches are of such."""
        if type(state.cache) is not DynamicCache:
            return state.cache is None
        return all(type(layer) is DynamicLayer for layer in state.cache.layers)

    def _kept(self, state: Sequenced, length: int) -> Kept:
        """Views of a sequence's first keys and values."""
        if state.cache is None:
            return self._batch.kept(state, length)
        return _part(state.cache, 0, slice(length))

    def _cache(self, layers: Kept) -> Any:
        """A cache of its own that holds copies."""
        cache = DynamicCache(config=self.model.config)
        for index, (keys, values) in enumerate(layers):
            cache.update(keys.clone(), values.clone(), index)
        return cache

    def _stack(self, states: tuple[Sequenced, ...]) -> _Stacked:
        longest = max(state.length for state in states)
        kept = [(self._kept(state, state.length), longest - state.length) for state in states]
        cache = DynamicCache(config=self.model.config)
        for index in range(len(kept[0][0])):
            pairs = [
                [functional.pad(tensor, (0, 0, missing, 0)) for tensor in layers[index]]
                for layers, missing in kept
            ]
            keys, values = zip(*pairs, strict=True)
            cache.update(torch.cat(keys), torch.cat(values), index)
        self._unstack([state for state in self._batch.members if state not in states])
        for state in states:
            state.cache = None
        return _Stacked(states, cache)

    def _unstack(self, states: Sequence[Sequenced]) -> None:
        for state in states:
            state.cache = self._cache(self._kept(state, state.length))

    def _disband(self) -> None:
        self._unstack(self._batch.members)
        self._batch = NO_BATCH
