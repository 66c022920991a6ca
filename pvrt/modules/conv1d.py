"""transformers' Conv1D (GPT-2 and its kin): linear layers whose weights lie transposed in files."""

from torch import nn
from transformers.pytorch_utils import Conv1D


class Conv1DLinear(nn.Linear):
    """A Conv1D as the linear layer that it is: weight [out, in]."""


def straighten(model: nn.Module) -> None:
    """Replace every Conv1D of a model by an empty linear layer on the meta device."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            weight = module.weight
            linear = Conv1DLinear(module.nx, module.nf, device="meta", dtype=weight.dtype)
            model.set_submodule(name, linear.requires_grad_(False))


def conv1d_weights(model: nn.Module) -> frozenset[str]:
    """Names of the weights of a model that its files hold transposed."""
    modules = model.named_modules()
    return frozenset(f"{name}.weight" for name, m in modules if isinstance(m, Conv1DLinear))
