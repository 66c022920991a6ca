"""One linear layer: from a dense module and its input second moment to a quantised module."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pvrt.linear import AQLMLinear
from pvrt.scheme import Scheme
from pvrt_tune.additive import fit_layer
from pvrt_tune.recipe import Recipe


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
    scheme = Scheme.parse(recipe.scheme)
    fit = fit_layer(linear.weight, second_moment, scheme, recipe.fit, generator, dtype)
    module = empty_like(linear, recipe, torch.float32).to(linear.weight.device)
    with torch.no_grad():
        module.codes.copy_(fit.layer.codes)
        module.codebooks.copy_(fit.layer.codebooks)
        module.scales.copy_(fit.layer.scales)
        if linear.bias is not None and module.bias is not None:
            module.bias.copy_(linear.bias)
    return QuantizedLinear(module, fit.relative_error)


def empty_like(linear: nn.Linear, recipe: Recipe, dtype: torch.dtype) -> AQLMLinear:
    """The quantised module of a dense layer's shape, on the CPU, waiting for its tensors."""
    return AQLMLinear(
        linear.in_features,
        linear.out_features,
        Scheme.parse(recipe.scheme),
        linear.bias is not None,
        dtype=dtype,
    )
