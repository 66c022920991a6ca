"""What the engine runs: any causal language model of transformers, behind one small interface."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from pvrt.linear import quantized_linears


class LanguageModel(Protocol):
    """Tokens in, logits out. The caller holds torch.inference_mode."""

    device: torch.device
    dtype: torch.dtype
    generation_config: Any
    bytes_per_token: int  # of weights that greedy decoding reads

    def start(self) -> Any:
        """The state of a new sequence. Only the newest one may be used."""

    def forward(
        self, state: Any, tokens: Sequence[int], keep: int, argmax_only: bool = False
    ) -> Tensor:
        """Append tokens to a sequence: logits [keep, V] in float32 after the last `keep` of them.

        The result may be overwritten by the next call. With argmax_only a model may save work: the
        largest logit is right, and no other reaches it.
        """


def weight_bytes(model: Any) -> int:
    """What the weights of a model take, tied and packed ones counted once."""
    packed = {id(m.packed): m.packed for m in quantized_linears(model).values() if m.packed}
    tensors = [tensor for layers in packed.values() for tensor in layers.weight.tensors]
    return sum(tensor.nbytes for tensor in [*model.parameters(), *tensors])


class TransformersModel:
    """A model of transformers as it is."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.generation_config = model.generation_config
        self.bytes_per_token = weight_bytes(model)
        if not getattr(model.config, "tie_word_embeddings", False):
            self.bytes_per_token -= model.get_input_embeddings().weight.nbytes

    def start(self) -> Any:
        """See LanguageModel."""
        # DynamicCache, not StaticCache: on CPU attention over a preallocated 2048 tokens costs
        # 180 ms per token for SmolLM2-135M where this costs 48 (float32, 2 cores).
        return DynamicCache(config=self.model.config)

    def forward(
        self, state: Any, tokens: Sequence[int], keep: int, argmax_only: bool = False
    ) -> Tensor:
        """See LanguageModel."""
        output = self.model(
            input_ids=torch.tensor([tokens], device=self.device),
            past_key_values=state,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: Tensor = output.logits[0]
        return logits.float()
