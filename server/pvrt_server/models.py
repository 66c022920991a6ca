"""What the engine runs: any causal language model of transformers, behind one small interface."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pvrt.linear import quantized_linears


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
    bytes_per_token: int  # of weights that greedy decoding reads
    cache_bytes_per_token: int
    most_rows: int  # sequences that `step` takes at once

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
    packed = {id(m.packed): m.packed for m in quantized_linears(model).values() if m.packed}
    tensors = [tensor for layers in packed.values() for tensor in layers.weight.tensors]
    return sum(tensor.nbytes for tensor in [*model.parameters(), *tensors])


@dataclass
class _State:
    cache: Any
    length: int = 0


class TransformersModel:
    """A model of transformers as it is."""

    def __init__(self, model: Any, rows: int = 1) -> None:
        self.model = model
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.generation_config = model.generation_config
        self.bytes_per_token = weight_bytes(model)
        if not getattr(model.config, "tie_word_embeddings", False):
            self.bytes_per_token -= model.get_input_embeddings().weight.nbytes
        self.most_rows = rows
        self.cache_bytes_per_token = self._measure_cache()

    def start(self) -> _State:
        """See LanguageModel."""
        # DynamicCache, not StaticCache: on CPU attention over a preallocated 2048 tokens costs
        # 180 ms per token for SmolLM2-135M where this costs 48 (float32, 2 cores).
        return _State(DynamicCache(config=self.model.config))

    def read(self, state: _State, tokens: Sequence[int], keep: int) -> Tensor:
        """See LanguageModel."""
        output = self.model(
            input_ids=torch.tensor([tokens], device=self.device),
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        state.length += len(tokens)
        logits: Tensor = output.logits[0]
        return logits.float()

    def step(
        self, states: Sequence[_State], tokens: Sequence[int], argmax_only: bool = False
    ) -> Tensor:
        """See LanguageModel."""
        rows = [self.read(state, (token,), 1) for state, token in zip(states, tokens, strict=True)]
        return torch.cat(rows)

    def copy(self, state: _State, length: int) -> _State | None:
        """See LanguageModel."""
        if any(type(layer) is not DynamicLayer for layer in state.cache.layers):
            return None  # windows and recurrent states have forgotten what came before
        cache = DynamicCache(config=self.model.config)
        for index, layer in enumerate(state.cache.layers):
            cache.update(
                layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), index
            )
        return _State(cache, length)

    def _measure_cache(self) -> int:
        """Bytes that one token takes in the cache, from a sequence of one token."""
        with torch.inference_mode():
            state = self.start()
            self.read(state, (0,), 1)
        kept = [
            (layer.keys, layer.values) for layer in state.cache.layers if hasattr(layer, "keys")
        ]
        return sum(tensor.nbytes for pair in kept for tensor in pair)
