"""Embeddings and lm_head in AQLM codes, in vLLM.

The rows of a vocabulary are padded and split over ranks. A head is packed for the device's kernel;
an embedding alone stays as in the checkpoint, since a lookup decodes single rows. Where both are
tied there is one weight, the embedding's.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from pvrt.errors import CheckpointError, ServeError
from pvrt.format.aqlm import PARTS
from pvrt.format.config_block import CONFIG_FILE
from pvrt.vllm_plugin.context import Context
from pvrt.vllm_plugin.layers import End
from pvrt.vllm_plugin.product import Product
from pvrt.vllm_plugin.weights import (
    checked,
    register_part,
    require_finite,
    require_loaded,
)


class InCodes(Tensor):
    """What stands in a layer's `weight`: shape, type and device of a weight that is in codes.

    vLLM reads these, and asks whether a draft model's weight equals it; it does not. Any other use
    raises ServeError. `owner` is the layer.
    """

    owner: Any

    @staticmethod
    def __new__(cls, owner: Any, shape: tuple[int, int], dtype: torch.dtype) -> "InCodes":
        device = owner.codes.device
        made: InCodes = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.owner = owner
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's is a stub
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> "bool | Tensor":
        """Compare and move to the CPU; refuse the rest."""
        if func is torch.ops.aten.equal.default:
            return False
        weight = next(argument for argument in args if isinstance(argument, InCodes))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.detach.default):
            return weight
        raise ServeError(
            f"{_name(weight.owner)}: a part of vLLM wants this weight decoded ({func}), and it is "
            "in codes; use a checkpoint that keeps it dense"
        )

    def __repr__(self, **keywords: Any) -> str:  # type: ignore[override]
        return f"InCodes({_name(self.owner)})"


def _load(layer: Any, param: Any, loaded_weight: Tensor) -> None:
    """Check and copy this rank's rows of one tensor; what is beyond the vocabulary stays zero."""
    scheme, part = layer.aqlm_end.scheme, param.aqlm_part
    shape = scheme.part_shape(part, layer.org_vocab_size, layer.embedding_dim)
    tensor = checked(scheme, _name(layer), part, loaded_weight, shape)
    if part == "in_scales":
        param.data.copy_(tensor)
    elif part != "codebooks":
        rows, group = layer.shard_indices, scheme.out_group_size
        first, end = rows.org_vocab_start_index // group, rows.org_vocab_end_index // group
        param.data.zero_()
        param.data[: end - first].copy_(tensor[first:end])
    else:
        param.data[0].copy_(tensor)
    layer.aqlm_done.add(part)


class AQLMEmbeddingMethod(QuantizeMethodBase):  # type: ignore[misc]  # vLLM is not typed
    """Looks tokens up in, and multiplies by, an AQLM weight [vocabulary, hidden]."""

    def __init__(self, context: Context, end: End) -> None:
        self.context = context
        self.end = end
        self._parts = (*PARTS, "in_scales") if end.in_scales else PARTS

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register empty parameters for this rank's rows; none for a head that will be tied.

        Raises CheckpointError for a weight of another shape than the model's, ServeError if ranks
        cut groups of rows.
        """
        layer.aqlm_end, layer.aqlm_done = self.end, set()
        if self.end.tied:
            return
        scheme, (rows,) = self.end.scheme, output_partition_sizes
        name, vocabulary = self.end.name, layer.org_vocab_size
        if not scheme.divides(vocabulary, input_size):
            raise CheckpointError(
                f"{name}: groups of {scheme} do not divide its {vocabulary} x {input_size} weights"
            )
        if scheme.out_group_size > 1 and not self.end.is_head:
            raise CheckpointError(
                f"{name}: {scheme} spans several rows, and an embedding is read row by row"
            )
        if rows % scheme.out_group_size or layer.num_embeddings != vocabulary:
            raise ServeError(
                f"{name}: a vocabulary in codes of {scheme} cannot be split into {rows} rows per "
                "rank or enlarged; try a smaller --tensor-parallel-size"
            )
        loader = MethodType(_load, layer)
        for part in self._parts:
            shape = scheme.part_shape(part, rows, input_size)
            if part == "codebooks":
                shape = 1, *shape
            register_part(layer, part, part, shape, scheme, params_dtype, loader)
        object.__setattr__(layer, "weight", InCodes(layer, (rows, input_size), params_dtype))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything was loaded; pack what logits are computed from."""
        done_already = hasattr(layer, "aqlm_product") and not layer.aqlm_done
        if _holder(layer) is not layer or done_already:
            return  # tied to embeddings, or no weights came anew
        self.context.layers.require_used()
        missing = [f"{self.end.name}.{part}" for part in self._parts if part not in layer.aqlm_done]
        if self.end.tied:
            raise CheckpointError(
                f"{CONFIG_FILE} ties {self.end.name} to embeddings in codes, which vLLM's model "
                f"does not do: the checkpoint lacks {', '.join(missing)}; keep embeddings dense"
            )
        require_loaded(self.end.name, missing, bool(layer.aqlm_done), [layer.scales])
        require_finite(layer, self.end.name, self._parts[1:])
        layer.aqlm_done.clear()
        stored = Product.as_stored([layer.num_embeddings_per_partition])
        layer.aqlm_product = layer.aqlm_table = stored
        if self.end.is_head or self.end.shared:
            best = stored.prepared(layer, self.end.name, self.end.scheme, self.context.notice)
            layer.aqlm_product = best
            if best is not stored and (self.end.is_head or best.reads_rows):
                layer.aqlm_table = best
                stored.drop(layer)  # else codes stay for lookups, beside the packed copy

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits: x [..., hidden] -> [..., rows of this rank]."""
        held = _holder(layer)
        product: Product = held.aqlm_product
        if held.aqlm_end.in_scales:
            x = x * held.in_scales
        return product.linear(held, x, bias)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Rows [..., hidden] of tokens [...], which count from this rank's first."""
        table: Product = layer.aqlm_table
        rows = table.rows(layer, input_)
        return rows * layer.in_scales if self.end.in_scales else rows

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let lm_head multiply by what the embeddings hold.

        Raises CheckpointError where one of them is dense, or the checkpoint holds both.
        """
        other = getattr(embed_tokens, "aqlm_end", None)
        if not self.end.tied or other is None:
            theirs = "dense" if other is None else "in codes too"
            raise CheckpointError(
                f"{CONFIG_FILE} ties {self.end.name} to embeddings that are {theirs}, and the "
                "checkpoint holds codes of it; set tie_word_embeddings to false"
            )
        object.__setattr__(layer, "weight", embed_tokens.weight)
        return layer


def _name(layer: Any) -> str:
    name: str = layer.aqlm_end.name
    return name


def _holder(layer: Any) -> Any:
    """The layer that holds the weight: a tied lm_head has none, and its `weight` is another's.

    Some models tie by `lm_head.weight = embed_tokens.weight`, without `tie_weights`.
    """
    weight = layer.__dict__.get("weight")
    return weight.owner if isinstance(weight, InCodes) else layer
