"""Embeddings and lm_head in AQLM codes, in vLLM. No published checkpoint has them.

The rows of a vocabulary are padded and split over ranks. They stay in the checkpoint's layout: a
lookup decodes single rows, and a tied lm_head multiplies by the embeddings' tensors.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from pvrt.errors import CheckpointError, ServeError
from pvrt.vllm_plugin.context import Context
from pvrt.vllm_plugin.weights import (
    PARTS,
    checked,
    decode_without_kernel,
    let_lora_find,
    part_shape,
    register_part,
    require_finite,
    require_loaded,
)
from pvrt_kernels import aqlm_dequantize, aqlm_linear


def _load(layer: Any, param: Any, loaded_weight: Tensor) -> None:
    """Check and copy this rank's rows of one tensor; what is beyond the vocabulary stays zero."""
    scheme, part = layer.aqlm_scheme, param.aqlm_part
    name = _name(layer)
    shape = part_shape(scheme, part, layer.org_vocab_size, layer.embedding_dim)
    tensor = checked(scheme, name, part, loaded_weight, shape)
    if part != "codebooks":
        rows = layer.shard_indices
        group = scheme.out_group_size
        first, end = rows.org_vocab_start_index // group, rows.org_vocab_end_index // group
        param.data.zero_()
        param.data[: end - first].copy_(tensor[first:end])
    else:
        param.data.copy_(tensor)
    layer.aqlm_done.add(part)


class AQLMEmbeddingMethod(QuantizeMethodBase):  # type: ignore[misc]  # vLLM is not typed
    """Looks tokens up in, and multiplies by, an AQLM weight [vocabulary, hidden]."""

    def __init__(self, context: Context) -> None:
        self.context = context

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
        """Register empty parameters for this rank's rows. Raises ServeError if they cut groups."""
        scheme, (rows,) = self.context.scheme, output_partition_sizes
        name = _name(layer)
        if not scheme.divides(layer.org_vocab_size, input_size):
            raise CheckpointError(
                f"{name}: groups of {scheme} do not divide its {layer.org_vocab_size} x "
                f"{input_size} weights"
            )
        if rows % scheme.out_group_size or layer.num_embeddings != layer.org_vocab_size:
            raise ServeError(
                f"{name}: a vocabulary in codes of {scheme} cannot be split into {rows} rows per "
                "rank or enlarged; try a smaller --tensor-parallel-size"
            )
        layer.aqlm_scheme, layer.aqlm_done = scheme, set()
        loader = MethodType(_load, layer)
        for part in PARTS:
            shape = part_shape(scheme, part, rows, input_size)
            register_part(layer, part, part, shape, scheme, params_dtype, loader)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything was loaded; on a CPU without a kernel, decode it."""
        if _holder(layer) is not layer or not hasattr(layer, "codes"):
            return  # tied to embeddings, or decoded already
        name = _name(layer)
        missing = [f"{name}.{part}" for part in PARTS if part not in layer.aqlm_done]
        require_loaded(name, missing, bool(layer.aqlm_done), [layer.scales])
        require_finite(layer, name, PARTS[1:])
        layer.aqlm_done.clear()
        if not decode_without_kernel(layer, self.context, name):
            let_lora_find(layer, layer.codes)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits: x [..., hidden] -> [..., rows of this rank]."""
        held = _holder(layer)
        if hasattr(held, "weight"):
            return F.linear(x, held.weight, bias)
        return aqlm_linear(x, held.codes, held.codebooks, held.scales, bias)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Rows [..., hidden] of tokens [...], which count from this rank's first."""
        if hasattr(layer, "weight"):
            return F.embedding(input_, layer.weight)
        group = self.context.scheme.out_group_size
        tokens = input_.reshape(-1).long()
        rows = tokens // group
        weight = aqlm_dequantize(layer.codes[rows], layer.codebooks, layer.scales[rows])
        if group > 1:
            weight = weight.view(tokens.shape[0], group, -1)
            weight = weight[torch.arange(tokens.shape[0], device=tokens.device), tokens % group]
        return weight.view(*input_.shape, -1)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let lm_head multiply by what the embeddings hold."""
        for part in PARTS:
            delattr(layer, part)
        object.__setattr__(layer, "aqlm_tied", embed_tokens)  # no submodule: counted once
        return layer


def _name(layer: Any) -> str:
    return getattr(layer, "prefix", "") or "embed_tokens"


def _holder(layer: Any) -> Any:
    """The layer that holds the weight: a tied lm_head has none."""
    return layer.__dict__.get("aqlm_tied", layer)
