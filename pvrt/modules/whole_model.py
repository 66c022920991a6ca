"""What is done to all quantised layers of a model at once."""

from collections.abc import Collection

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pvrt.format.scheme import Scheme
from pvrt.modules.aqlm_embedding import AQLMEmbedding, TiedHead, embedding_scale
from pvrt.modules.aqlm_layer import AQLMLayer, pack
from pvrt.modules.aqlm_linear import AQLMConv1D, AQLMLinear

# Layers that transformers' decoders call one after the other with the same input.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def quantized_layers(model: nn.Module) -> dict[str, AQLMLayer]:
    """All layers in codes of a model by module name: linear ones and embeddings."""
    return {name: mod for name, mod in model.named_modules() if isinstance(mod, AQLMLayer)}


def layer_in_codes(
    dense: nn.Module, scheme: Scheme, bias: bool, in_scales: bool, dtype: torch.dtype | None = None
) -> AQLMLayer | None:
    """An empty layer in codes for the place of a dense one; None for one that they cannot be."""
    if isinstance(dense, nn.Linear):
        shape = dense.in_features, dense.out_features
        return AQLMLinear(*shape, scheme, bias, in_scales, dtype=dtype)
    if isinstance(dense, Conv1D):
        return AQLMConv1D(dense.nx, dense.nf, scheme, bias, in_scales, dtype=dtype)
    if isinstance(dense, nn.Embedding) and scheme.out_group_size == 1:
        scale, (rows, width) = embedding_scale(dense), dense.weight.shape
        if scale is not None:
            return AQLMEmbedding(rows, width, scheme, scale, in_scales, dtype=dtype)
    return None


def pack_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Pack every layer that multiplies by its weight, if its device has a packed kernel.

    These are linear layers, and embeddings that a head is tied to. q, k and v become one weight,
    gate and up another; those that were packed alone are packed anew. dtype as in `pack`.
    """
    for parent in list(model.modules()):
        for names in _SIBLINGS:
            group = [getattr(parent, name, None) for name in names]
            layers = [layer for layer in group if isinstance(layer, AQLMLinear)]
            if len(layers) == len(names) and _alike(layers) and not _packed_together(layers):
                for layer in layers:
                    layer.unpack()
                pack(layers, dtype)
    for single in quantized_layers(model).values():
        if single.packed is None and single.multiplies:
            pack([single], dtype)


def _packed_together(layers: list[AQLMLinear]) -> bool:
    return layers[0].packed is not None and len({id(layer.packed) for layer in layers}) == 1


def _alike(layers: list[AQLMLinear]) -> bool:
    """Whether layers can share one packed weight."""
    return (
        len(
            {
                (
                    layer.in_features,
                    layer.scheme,
                    layer.bias is None,
                    layer.in_scales,  # of its own, if any
                    layer.float_types,
                )
                for layer in layers
            }
        )
        == 1
    )


def decode_once(model: nn.Module, schemes: Collection[object] | None = None) -> None:
    """Replace layers in codes of a model by the dense ones that they stand for, in place.

    Those of the given schemes, by default all.
    """
    dense = {}
    for name, layer in quantized_layers(model).items():
        if schemes is None or layer.scheme in schemes:
            dense[layer] = layer.to_dense()
            model.set_submodule(name, dense[layer])
    for name, head in list(model.named_modules()):
        if isinstance(head, TiedHead) and head.embedding in dense:
            embedding = dense[head.embedding]
            assert isinstance(embedding, nn.Embedding)
            model.set_submodule(name, head.to_dense(embedding))
