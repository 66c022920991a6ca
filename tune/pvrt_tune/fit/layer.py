"""One linear layer: from a dense module and its input second moment to a quantised module."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pvrt.format.scheme import GridScheme, Scheme
from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt_tune.fit import additive, grid
from pvrt_tune.fit.additive import fit_layer
from pvrt_tune.fit.grid import GridLinear, fit_grid
from pvrt_tune.settings import FitSettings, Recipe


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantised module (float32 parameters) and its relative error tr(EHE^T) / tr(WHW^T)."""

    module: nn.Module
    relative_error: float


def quantize_linear(
    linear: nn.Linear,
    second_moment: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> QuantizedLinear:
    """Quantise one dense layer by the recipe's scheme, given H = mean of x x^T [in, in].

    Values are rounded to what `dtype` can store.
    """
    scheme = recipe.parsed_scheme
    tensors: Mapping[str, Tensor | None]
    if isinstance(scheme, GridScheme):
        rounded = fit_grid(linear.weight, second_moment, scheme, recipe.fit).result(dtype)
        tensors = {"codes": rounded.codes, "scales": rounded.scales, "zeros": rounded.zeros}
        error = rounded.relative_error
    else:
        fit = fit_layer(linear.weight, second_moment, scheme, recipe.fit, generator).result(dtype)
        layer, error = fit.layer, fit.relative_error
        tensors = {"codes": layer.codes, "codebooks": layer.codebooks, "scales": layer.scales}
    module = empty_like(linear, scheme, torch.float32).to(linear.weight.device)
    state = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if linear.bias is not None:
        state["bias"] = linear.bias.detach()
    module.load_state_dict(state)
    return QuantizedLinear(module, error)


def empty_like(
    linear: nn.Linear, scheme: Scheme | GridScheme, dtype: torch.dtype
) -> AQLMLinear | GridLinear:
    """The quantised module of a dense layer's shape, on the CPU, waiting for its tensors."""
    bias = linear.bias is not None
    shape = linear.in_features, linear.out_features
    if isinstance(scheme, GridScheme):
        return GridLinear(*shape, scheme, bias, dtype=dtype)
    return AQLMLinear(*shape, scheme, bias, dtype=dtype)


def peak_bytes(
    shape: tuple[int, int], scheme: Scheme | GridScheme, settings: FitSettings, device: str
) -> int:
    """Peak of `quantize_linear` for a layer [out, in], beyond its weight and moment in float32."""
    if isinstance(scheme, GridScheme):
        return grid.peak_bytes(shape, scheme, device)
    return additive.peak_bytes(shape, scheme, settings, device)
