"""A quantised layer as a dense one whose weight is trained, and the representation behind it."""

import torch
from torch import nn

from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt_tune.fit.grid import GridLinear
from pvrt_tune.pv.representation import Representation, represent


def decoded(layer: AQLMLinear | GridLinear, dtype: torch.dtype) -> tuple[nn.Linear, Representation]:
    """A dense layer with the decoded weight in `dtype` and the layer's own bias, and its codes."""
    representation = represent(layer)
    bias = layer.bias is not None
    dense = nn.Linear(layer.in_features, layer.out_features, bias, device="meta")
    dense.weight = nn.Parameter(representation.decode().to(dtype))
    if layer.bias is not None:
        dense.bias = layer.bias
    return dense, representation
