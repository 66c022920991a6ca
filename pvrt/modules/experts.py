"""Mixture-of-experts layers with a linear layer per projection and expert.

transformers 5 fuses the experts of a layer into two 3-D parameters when it loads them, and some
models are published so. Quantised experts have codes and codebooks of their own, so here they are
apart: under the names that files use which have them apart ("block_sparse_moe.experts.3.w1" of
Mixtral, "mlp.experts.3.gate_proj" of others), and under names of that kind where no file has.
"""

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

_FIRST = ("gate_up_proj", "up_proj")  # with gates and without
_DOWN = "down_proj"


@dataclass(frozen=True)
class Part:
    """Where a tensor of one expert lies: `rows` of `tensor`[`expert`], which may be transposed."""

    tensor: str
    expert: int
    rows: slice
    transposed: bool

    def of(self, fused: Any) -> Tensor:
        """The tensor, of what becomes one when it is indexed."""
        own: Tensor = fused[self.expert]
        return (own.T if self.transposed else own)[self.rows]


class ExpertList(nn.Module):
    """The experts of one layer: children "0", "1", ..., each with its projections.

    `names` are theirs: gate, up and down, or up and down alone. Routing is the surrounding
    module's; what is between the projections (activation, any clamp) is the fused module's own.
    `fused_in_files` says whether a dense model's files have them fused: tensors of `fused_shapes`.
    """

    def __init__(self, fused: nn.Module, names: tuple[str, ...], fused_in_files: bool) -> None:
        super().__init__()
        gated = hasattr(fused, _FIRST[0])
        first = _FIRST[0] if gated else _FIRST[1]
        weight, widest = fused.get_parameter(_DOWN), fused.get_parameter(first)
        # Classes that transformers' fast products do not know say nothing of their layout.
        usual = tuple(widest.shape[1:]) == (2 * weight.shape[2], weight.shape[1])
        self.transposed: bool = getattr(fused, "is_transposed", not usual)
        count, hidden, width = weight.shape
        if self.transposed:
            hidden, width = width, hidden
        self.names, self.fused_in_files = names, fused_in_files
        self._biased = hasattr(fused, f"{_DOWN}_bias")
        self._interleaved = not getattr(fused, "is_concatenated", True)
        #: Whether experts without tokens compute as well, so that their weights have gradients.
        self.all_compute = False
        self.identities: int = getattr(fused, "zero_expert_num", 0)  # numbered after the others
        rows = [slice(None)] * len(names)
        if gated:
            rows[:2] = slice(0, width), slice(width, None)
            if self._interleaved:
                rows[:2] = slice(0, None, 2), slice(1, None, 2)
        tensors = (first, first, _DOWN)[-len(names) :]
        self._parts = dict(zip(names, zip(tensors, rows, strict=True), strict=True))
        # (in, out) of gate, up and down
        shapes = ((hidden, width), (hidden, width), (width, hidden))[-len(names) :]
        for index in range(count):
            parts = {
                name: nn.Linear(*shape, bias=self._biased, device="meta", dtype=weight.dtype)
                for name, shape in zip(names, shapes, strict=True)
            }
            self.add_module(str(index), nn.ModuleDict(parts).requires_grad_(False))
        self.fused_shapes = {n: list(p.shape) for n, p in fused.named_parameters(recurse=False)}
        for name in self.fused_shapes:
            delattr(fused, name)
        self.__dict__["fused"] = fused  # no submodule: it has nothing to store

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Of every tensor its name and where a fused module has it."""
        for index in range(len(self._modules)):
            for name, (tensor, rows) in self._parts.items():
                yield f"{index}.{name}.weight", Part(tensor, index, rows, self.transposed)
                if self._biased:
                    yield f"{index}.{name}.bias", Part(f"{tensor}_bias", index, rows, False)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [tokens, width]; top_k_index and top_k_weights [tokens, k].

        Without the latter, hidden_states [experts * tokens, width]: every expert has tokens of its
        own, which are zero where it is not chosen.
        """
        if top_k_index is None or top_k_weights is None:
            return self._own_tokens(hidden_states)
        output = torch.zeros_like(hidden_states)
        count = len(self._modules)
        used = set(top_k_index.flatten().tolist())
        for index in sorted(used.union(range(count) if self.all_compute else ())):
            if index >= count + self.identities:  # expert parallelism's mark for "not mine"
                continue
            tokens, position = torch.where(top_k_index == index)
            x = hidden_states[tokens]
            weighted = self._expert(index, x) * top_k_weights[tokens, position, None]
            output = output.index_add(0, tokens, weighted.to(output.dtype))
        return output

    def _own_tokens(self, hidden_states: Tensor) -> Tensor:
        outputs = []
        for index, x in enumerate(hidden_states.chunk(len(self._modules))):
            (chosen,) = torch.where(x.any(-1))
            output = torch.zeros_like(x)
            if len(chosen) or self.all_compute:
                output = output.index_copy(0, chosen, self._expert(index, x[chosen]).to(x.dtype))
            outputs.append(output)
        return torch.cat(outputs)

    def _expert(self, index: int, x: Tensor) -> Tensor:
        """Output of one expert for x [tokens, width]."""
        if index >= len(self._modules):
            return x
        expert: Any = self._modules[str(index)]
        *first, down = (expert[name] for name in self.names)
        fused = self.__dict__["fused"]
        made = [layer(x) for layer in first]
        if len(made) == 1:
            inner = fused.act_fn(made[0])
        elif self._interleaved:
            inner = fused._apply_gate(torch.stack(made, -1).flatten(-2))
        elif hasattr(fused, "_apply_gate"):
            inner = fused._apply_gate(torch.cat(made, -1))
        else:
            inner = fused.act_fn(made[0]) * made[1]
        output: Tensor = down(inner)
        return output


def unfuse(model: nn.Module, conversions: Iterable[Any]) -> list[str]:
    """Replace all fused experts of a model on the meta device. Returns the names of their modules.

    `conversions`: the model's weight conversions, which name the projections in files.
    """
    published = _projections(conversions)
    found = []
    for name, module in list(model.named_modules()):
        fused = getattr(getattr(module, _DOWN, None), "ndim", 0) == 3
        if not fused or len(inspect.signature(module.forward).parameters) not in (1, 3):
            continue
        names = published
        if names is None:  # those of the readers that have them apart
            usual = ("gate_proj", "up_proj", "down_proj")
            names = usual if hasattr(module, _FIRST[0]) else usual[1:]
        model.set_submodule(name, ExpertList(module, names, published is None))
        found.append(name)
    return found


def are_fused_in_files(conversions: Iterable[Any]) -> bool:
    """Whether a dense model's files have its experts, if any, fused."""
    return _projections(conversions) is None


def _projections(conversions: Iterable[Any]) -> tuple[str, ...] | None:
    """Names of (gate,) up and down projection in files, from the conversions that fuse them."""
    found: dict[str, list[str]] = {}
    for conversion in _fusing(conversions):
        target = conversion.target_patterns[0]
        leaves = [source.split("*.")[-1] for source in conversion.source_patterns]
        found[target.rpartition(".")[2]] = [leaf.removesuffix(".weight") for leaf in leaves]
    first = next((found[name] for name in _FIRST if name in found), [])
    names = (*first, *found.get(_DOWN, []))
    return names if len(found) == 2 and len(names) in (2, 3) else None


def _fusing(conversions: Iterable[Any]) -> list[Any]:
    ends = tuple(f"experts.{name}" for name in (*_FIRST, _DOWN))
    return [
        conversion
        for conversion in conversions
        if isinstance(conversion, WeightConverter)
        and conversion.target_patterns[0].endswith(ends)
        and "*" in conversion.source_patterns[0]
        and all(isinstance(op, MergeModulelist | Concatenate) for op in conversion.operations)
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
