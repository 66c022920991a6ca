"""Mixtures of AQLM experts in vLLM (Mixtral, Qwen2-MoE and others of their kind).

Files hold three linear layers per expert, each with codebooks of its own. vLLM holds the experts of
a block in one module; here their tensors are stacked, w13 (gate and up, split by outputs over
ranks) and w2 (down, split by inputs). Routing, shared experts and the sum over ranks are vLLM's.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from pvrt.errors import CheckpointError, ServeError
from pvrt.format.aqlm import PARTS
from pvrt.format.config_block import CONFIG_FILE
from pvrt.format.scheme import Scheme
from pvrt.vllm_plugin.context import Context
from pvrt.vllm_plugin.layers import Layers, same_scheme
from pvrt.vllm_plugin.versions import load_experts_of_gpt_oss, load_experts_with
from pvrt.vllm_plugin.weights import (
    checked,
    dense_in_quantised,
    register_packed,
    register_part,
    require_finite,
    require_loaded,
)
from pvrt_kernels.grouped import GroupedWeight, aqlm_grouped_linear, aqlm_pack_group

_TENSOR = re.compile(r"(\d+)\.(\w+)\.(?:base_layer\.)?(\w+)")  # expert, projection, part


def _gated_with(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gate, up: activation(gate) * up


def _gated_as_in_gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


_ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": _gated_with(F.silu),
    "gelu": _gated_with(F.gelu),
    "gelu_tanh": _gated_with(lambda x: F.gelu(x, approximate="tanh")),
    "swigluoai": _gated_as_in_gpt_oss,
}
_STACKS = ("w13", "w2")


@dataclass
class _Load:
    """What the experts of one block expect from the checkpoint, and what has come so far.

    `schemes` are those of w13 and w2; `biased` says whether both have biases. `projections` are the
    names of w1 (gate), w2 (down) and w3 (up) in files; `width` is that between them before the
    split over ranks. `done` counts experts by their number in files.
    """

    schemes: dict[str, Scheme]
    prefix: str
    projections: dict[str, str]
    hidden: int
    width: int
    rank: int
    ranks: int
    biased: bool = False
    done: set[tuple[int, str, str]] = field(default_factory=set)

    @property
    def parts(self) -> tuple[str, ...]:
        """What every projection has."""
        return (*PARTS, "bias") if self.biased else PARTS

    def scheme(self, shard: str) -> Scheme:
        """The scheme of w1, w2 or w3."""
        return self.schemes["w2" if shard == "w2" else "w13"]

    def shape(self, shard: str, part: str) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        down = (self.hidden, self.width)
        if part == "bias":
            return (self.hidden if shard == "w2" else self.width,)
        return self.scheme(shard).part_shape(part, *(down if shard == "w2" else down[::-1]))

    def share(self, shard: str, part: str, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor."""
        if shard == "w2" and part == "bias":  # added once, before the sum over ranks
            return tensor if self.rank == 0 else torch.zeros_like(tensor)
        if part == "codebooks" or (shard == "w2" and part == "scales"):
            return tensor
        return tensor.chunk(self.ranks, 1 if shard == "w2" else 0)[self.rank]


def _load(
    layer: Any,
    param: Any,
    loaded_weight: Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """Check and copy one tensor of one expert: the weight_loader of all parameters.

    The signature is that of vLLM's own; `shard_id` is w1, w2 or w3, `expert_id` counts all ranks'.
    """
    load: _Load = layer.aqlm_load
    part = param.aqlm_part
    name = f"{load.prefix}.{expert_id}.{load.projections[shard_id]}"
    shape = load.shape(shard_id, part)
    tensor = checked(load.scheme(shard_id), name, part, loaded_weight, shape)
    local = layer._map_global_expert_id_to_local_expert_id(expert_id)
    if local >= 0:  # not on another rank of expert parallelism
        target = param.data[local]
        share = load.share(shard_id, part, tensor)
        if part == "codebooks":
            target[1 if shard_id == "w3" else 0].copy_(share)
        else:
            first = share.shape[0] if shard_id == "w3" else 0
            target[first : first + share.shape[0]].copy_(share)
        load.done.add((expert_id, shard_id, part))
    return (local >= 0) if return_success else None


def _load_all(layer: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Load tensors named "3.w1.codes"; yields the names of the parameters they went to."""
    load: _Load = layer.aqlm_load
    shards = {name: shard for shard, name in load.projections.items()}
    for name, tensor in weights:
        # As gpt-oss' mapper calls the bias of each expert.
        name = name.replace(".w2_bias", f".{load.projections['w2']}.bias")
        match = _TENSOR.fullmatch(name)
        if match is None or match[2] not in shards or match[3] not in load.parts:
            raise dense_in_quantised(f"{load.prefix}.{name.removesuffix('.weight')}")
        shard = shards[match[2]]
        parameter = f"{'w2' if shard == 'w2' else 'w13'}_{match[3]}"
        _load(layer, getattr(layer, parameter), tensor, parameter, shard, int(match[1]))
        yield parameter


def _check(layer: Any, load: _Load, width: int) -> None:
    """Raise ServeError for what these experts cannot do here, CheckpointError for impossible ones.

    `width` is a rank's.
    """
    unknown = layer.activation.value not in _ACTIVATIONS
    limits = [getattr(layer, f"swiglu_{name}", None) for name in ("limit", "alpha", "beta")]
    if unknown or any(limit is not None for limit in limits):
        raise ServeError(
            f"{load.prefix}: pvrt runs gated experts without clamps of their own, with one of "
            f"{', '.join(_ACTIVATIONS)}, and not with {layer.activation.value}; keep the experts "
            "dense (linear_weights_not_to_quantize)"
        )
    for stack, scheme in load.schemes.items():
        whole, own = (load.width, load.hidden), (width, load.hidden)
        if stack == "w2":
            whole, own = whole[::-1], own[::-1]
        if not scheme.divides(*whole):
            raise CheckpointError(
                f"{load.prefix}: groups of {scheme} do not divide its experts of {load.width} x "
                f"{load.hidden}; if they are dense, {CONFIG_FILE} must list them in "
                "linear_weights_not_to_quantize"
            )
        if not scheme.divides(*own):
            raise ServeError(
                f"{load.prefix}: groups of {scheme} do not divide the {width} of {load.width} "
                "inner features that tensor parallelism leaves to each rank; try a smaller "
                "--tensor-parallel-size, or --enable-expert-parallel"
            )


def _schemes(
    layers: Layers, prefix: str, projections: dict[str, str], experts: int
) -> dict[str, Scheme]:
    """The schemes of w13 and w2. Raises ServeError where one of them has several."""
    stacks = {"w13": ("w1", "w3"), "w2": ("w2",)}
    return {
        stack: same_scheme(
            [f"{prefix}.{n}.{projections[shard]}" for n in range(experts) for shard in shards],
            layers,
            f"{prefix}: all experts' {' and '.join(str(projections[shard]) for shard in shards)}",
        )
        for stack, shards in stacks.items()
    }


class AQLMExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]  # vLLM is not typed
    """Runs the routed experts of one block on AQLM weights."""

    def __init__(self, context: Context, moe: Any) -> None:
        super().__init__(moe)
        self.context = context

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register empty parameters for this rank's E experts; sizes are this rank's too.

        w13_codes [E, 2 width/out_group, hidden/g, M], w13_codebooks [E, 2, M, 2^B, out_group, g],
        w13_scales [E, 2 width/out_group, 1, 1, 1]; w2 likewise with one codebook set.
        """
        width, layers = intermediate_size_per_partition, self.context.layers
        names = (layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name)
        projections = dict(zip(("w1", "w2", "w3"), names, strict=True))
        prefix = layers.local(layer.layer_name)
        parallel = layer.moe_config.moe_parallel_config
        layer.aqlm_load = load = _Load(
            _schemes(layers, prefix, projections, layer.global_num_experts),
            prefix,
            projections,
            hidden_size,
            width * parallel.tp_size,
            parallel.tp_rank,
            parallel.tp_size,
            layer.moe_config.has_bias,
        )
        _check(layer, load, width)
        load_experts_with(layer, _load_all)
        if type(layer).__name__.startswith("GptOss"):
            load_experts_of_gpt_oss()
        loader = MethodType(_load, layer)
        shapes = {"w13": (2 * width, hidden_size), "w2": (hidden_size, width)}
        for stack, shape in shapes.items():
            scheme = load.schemes[stack]
            for part in PARTS:
                sets = ((2,) if stack == "w13" else (1,)) if part == "codebooks" else ()
                size = num_experts, *sets, *scheme.part_shape(part, *shape)
                register_part(layer, f"{stack}_{part}", part, size, scheme, params_dtype, loader)
            if load.biased:
                size = num_experts, shape[0]
                register_part(layer, f"{stack}_bias", "bias", size, scheme, params_dtype, loader)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's own kernels are not used."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything was loaded, then pack it for the device's kernel."""
        if not hasattr(layer, "w13_codes"):
            return  # packed already
        self.context.layers.require_used()
        load: _Load = layer.aqlm_load
        local = layer._map_global_expert_id_to_local_expert_id
        missing = [
            f"{load.prefix}.{expert}.{name}.{part}"
            for expert in range(layer.global_num_experts)
            for shard, name in load.projections.items()
            for part in load.parts
            if local(expert) >= 0 and (expert, shard, part) not in load.done
        ]
        scales = [getattr(layer, f"{stack}_scales") for stack in _STACKS]
        require_loaded(load.prefix, missing, bool(load.done), scales)
        floats = [f"{stack}_{part}" for stack in _STACKS for part in load.parts[1:]]
        require_finite(layer, load.prefix, floats)
        load.done.clear()
        width = load.width // load.ranks
        layer.aqlm_grouped = {
            "w13": self._pack(layer, "w13", [width, width]),
            "w2": self._pack(layer, "w2", [load.hidden]),
        }

    def _pack(self, layer: Any, stack: str, sizes: list[int]) -> tuple[str, list[int], list[str]]:
        """Put the kernel's layout in place of the checkpoint's; kernel, sizes and new names."""
        codes, codebooks, scales = (getattr(layer, f"{stack}_{part}").data for part in PARTS)
        weight = aqlm_pack_group(codes, codebooks, scales, layer.params_dtype, sizes)
        if weight.decoded:
            stored = codes, codebooks, scales
            scheme = layer.aqlm_load.schemes[stack]
            self.context.notice.give(scheme, layer.layer_name, weight.tensors, stored)
        for part in PARTS:
            delattr(layer, f"{stack}_{part}")
        return weight.kernel, sizes, register_packed(layer, f"{stack}_packed", weight.tensors)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """x [tokens, hidden], topk_weights and topk_ids [tokens, k] -> [tokens, hidden].

        On a rank of tensor parallelism a part of the sum, which vLLM completes.
        """
        count = topk_ids.shape[1]
        experts = layer.expert_map
        index = (topk_ids if experts is None else experts[topk_ids.long()]).reshape(-1)
        rows = x.repeat_interleave(count, 0)
        if layer.apply_router_weight_on_input:
            rows = rows * topk_weights.reshape(-1, 1).to(x.dtype)
        gate, up = self._product(layer, rows, index, "w13").chunk(2, -1)
        inner = _ACTIVATIONS[layer.activation.value](gate, up)
        outputs = self._product(layer, inner, index, "w2").view(x.shape[0], count, -1).float()
        if not layer.apply_router_weight_on_input:
            outputs = outputs * topk_weights.unsqueeze(-1)
        return outputs.sum(1).to(x.dtype)

    def _product(self, layer: Any, rows: Tensor, index: Tensor, stack: str) -> Tensor:
        """Each row times its expert's weight, plus its bias; zero where the index is negative."""
        kernel, sizes, names = layer.aqlm_grouped[stack]
        # Looked up anew: vLLM may have moved the parameters (offloading, sleep mode).
        weight = GroupedWeight(kernel, tuple([getattr(layer, name) for name in names]), sizes)
        product = aqlm_grouped_linear(rows, index, weight)
        if not layer.aqlm_load.biased:
            return product
        biases = getattr(layer, f"{stack}_bias")[index.clamp(min=0).long()]
        return torch.where((index >= 0)[:, None], product + biases.to(product.dtype), product)
