"""Mixture-of-experts layers with a linear layer per projection and expert, as published.

transformers 5 fuses the experts of a layer into two 3-D parameters when it loads them. Quantised
experts have codes and codebooks of their own, so here they are apart again, under the names that
their files use ("block_sparse_moe.experts.3.w1" of Mixtral, "mlp.experts.3.gate_proj" of others).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

_GATE_UP, _DOWN = "experts.gate_up_proj", "experts.down_proj"


class ExpertList(nn.Module):
    """The experts of one layer: children "0", "1", ..., each with gate, up and down projections.

    `names` are theirs in this order. Routing is the surrounding module's; the activation (and any
    clamp) between the projections is the fused module's own.
    """

    def __init__(self, fused: nn.Module, names: tuple[str, str, str]) -> None:
        super().__init__()
        weight = fused.get_parameter("down_proj")
        count, hidden, width = weight.shape
        self.names = names
        #: Whether experts without tokens compute as well, so that their weights have gradients.
        self.all_compute = False
        # (in, out) of gate, up and down
        shapes = dict(zip(names, ((hidden, width), (hidden, width), (width, hidden)), strict=True))
        for index in range(count):
            parts = {
                name: nn.Linear(*shape, bias=False, device="meta", dtype=weight.dtype)
                for name, shape in shapes.items()
            }
            self.add_module(str(index), nn.ModuleDict(parts).requires_grad_(False))
        for name in ("gate_up_proj", "down_proj"):
            delattr(fused, name)
        self.__dict__["fused"] = fused  # no submodule: it has nothing to store

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, width]; top_k_index and top_k_weights [tokens, k]."""
        output = torch.zeros_like(hidden_states)
        used = set(top_k_index.flatten().tolist())
        for index in sorted(used.union(range(len(self._modules)) if self.all_compute else ())):
            if index >= len(self._modules):  # an expert-parallel rank's mark for "not mine"
                continue
            expert: Any = self._modules[str(index)]
            gate, up, down = (expert[name] for name in self.names)
            tokens, position = torch.where(top_k_index == index)
            x = hidden_states[tokens]
            inner = self.__dict__["fused"]._apply_gate(torch.cat([gate(x), up(x)], -1))
            weighted = down(inner) * top_k_weights[tokens, position, None]
            output = output.index_add(0, tokens, weighted.to(output.dtype))
        return output


def unfuse(model: nn.Module, conversions: Iterable[Any]) -> list[str]:
    """Replace all fused experts of a model on the meta device. Returns the names of their modules.

    `conversions`: the model's weight conversions, which name the projections in files. Raises
    ValueError for experts that are not gated pairs of plain products.
    """
    names = _projections(conversions)
    found = []
    for name, module in list(model.named_modules()):
        if not (hasattr(module, "down_proj") and getattr(module.down_proj, "ndim", 0) == 3):
            continue
        plain = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
        if names is None or not plain or module.has_bias or module.is_transposed:
            raise ValueError(
                f"{name} is a {type(module).__name__}: its experts are stored fused, with biases "
                "or transposed, and cannot be quantised one by one"
            )
        model.set_submodule(name, ExpertList(module, names))
        found.append(name)
    return found


def _projections(conversions: Iterable[Any]) -> tuple[str, str, str] | None:
    """Names of gate, up and down projection in files, from the conversions that fuse them."""
    found: dict[str, list[str]] = {}
    for conversion in _fusing(conversions):
        target = conversion.target_patterns[0]
        leaves = [source.split("*.")[-1] for source in conversion.source_patterns]
        found[target.rpartition(".")[2]] = [leaf.removesuffix(".weight") for leaf in leaves]
    gate_up, down = found.get("gate_up_proj", []), found.get("down_proj", [])
    return (gate_up[0], gate_up[1], down[0]) if len(gate_up) == 2 and len(down) == 1 else None


def _fusing(conversions: Iterable[Any]) -> list[Any]:
    return [
        conversion
        for conversion in conversions
        if isinstance(conversion, WeightConverter)
        and conversion.target_patterns[0].endswith((_GATE_UP, _DOWN))
        and "*" in conversion.source_patterns[0]
    ]


def without_fusing(conversions: Iterable[Any]) -> list[Any]:
    """The conversions without those that fuse experts."""
    conversions = list(conversions)
    fusing = {id(conversion) for conversion in _fusing(conversions)}
    return [conversion for conversion in conversions if id(conversion) not in fusing]


def module_name(published: str, conversions: Iterable[Any]) -> str:
    """Name in the model of a layer named as in files."""
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    renamed, _ = rename_source_key(f"{published}.weight", renamings, [])
    return str(renamed).removesuffix(".weight")
