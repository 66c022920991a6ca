"""AQLM weights in vLLM's linear layers.

vLLM fuses layers (q, k and v; gate and up) and splits them over ranks; every source layer keeps its
own codebooks, complete on every rank.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from pvrt.errors import CheckpointError, ServeError
from pvrt.format.config_block import CONFIG_FILE
from pvrt.vllm_plugin.context import Context
from pvrt.vllm_plugin.weights import (
    PARTS,
    checked,
    decode_without_kernel,
    dense_in_quantised,
    let_lora_find,
    part_shape,
    register_packed,
    require_finite,
    require_loaded,
)
from pvrt_kernels import aqlm_linear
from pvrt_kernels.packed import aqlm_pack, aqlm_packed_linear

_QKV = {"q": 0, "k": 1, "v": 2}

# Which source layers of a fused layer a tensor holds: one of q, k and v; one or several by number;
# None where the checkpoint itself stores the layer fused (or it is not fused at all).
ShardId = str | int | tuple[int, ...] | None


@dataclass
class _Load:
    """What a layer expects from the checkpoint, and what has come so far.

    `rows` are output features of every source layer and `in_features` its inputs, both as stored,
    before any split over ranks. `loader` is vLLM's, and splits codes and scales.
    """

    context: Context
    prefix: str
    rows: list[int]
    in_features: int
    loader: Callable[..., None]
    done: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def sources(self, shard: ShardId) -> list[int]:
        """Numbers of the source layers that a tensor holds."""
        if shard is None:
            return list(range(len(self.rows)))
        if isinstance(shard, tuple):
            return list(shard)
        return [_QKV[shard] if isinstance(shard, str) else shard]

    def name(self, sources: list[int]) -> str:
        """Name of one source layer in the checkpoint, or of the whole layer."""
        parent, _, last = self.prefix.rpartition(".")
        names = self.context.fused.get(last, [])
        if len(sources) != 1 or len(names) != len(self.rows):
            return self.prefix
        return f"{parent}.{names[sources[0]]}".removeprefix(".")

    def shape(self, part: str, sources: list[int]) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        rows = sum(self.rows[source] for source in sources)
        return part_shape(self.context.scheme, part, rows, self.in_features)


def _load(layer: Any, param: Any, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
    """Check and copy one tensor of a quantised layer: the weight_loader of all its parameters.

    Bound to its layer as a method, not held in a closure: vLLM keeps the loaders of all parameters
    in a global table for reloading and cuts only bound methods loose, so that a model can be freed.
    """
    load: _Load = layer.aqlm_load
    sources = load.sources(loaded_shard_id)
    name = load.name(sources)
    if param is layer:  # vLLM's fused layers pass themselves for a name that they do not have
        raise dense_in_quantised(name)
    part = getattr(param, "aqlm_part", "bias")  # a bias is vLLM's own parameter
    shape = load.shape(part, sources)
    loaded_weight = checked(load.context.scheme, name, part, loaded_weight, shape)
    shard = () if loaded_shard_id is None else (loaded_shard_id,)
    if part == "codebooks":
        for source in sources:
            param.data[source].copy_(loaded_weight)
    elif part == "bias":
        type(layer).weight_loader(layer, param, loaded_weight, *shard)
    else:
        load.loader(param, loaded_weight, *shard)
    load.done[part].update(sources)


def _stored_rows(layer: Any, partition_sizes: list[int], ranks: int) -> list[int]:
    """Output features of every source layer in the checkpoint, before the split over ranks."""
    # Where there are more ranks than k and v heads, several ranks hold the same head.
    copies = getattr(layer, "num_kv_head_replicas", 1)
    return [
        rows * ranks // (copies if number else 1) for number, rows in enumerate(partition_sizes)
    ]


def _check_groups(load: _Load, partition_sizes: list[int], in_features: int) -> None:
    scheme = load.context.scheme
    for rows, stored in zip(partition_sizes, load.rows, strict=True):
        if not scheme.divides(stored, load.in_features):
            raise CheckpointError(
                f"{load.prefix}: groups of {scheme} do not divide its {stored} x "
                f"{load.in_features} weights; if it is dense, {CONFIG_FILE} must list it in "
                "linear_weights_not_to_quantize"
            )
        if not scheme.divides(rows, in_features):
            raise ServeError(
                f"{load.prefix}: groups of {scheme} do not divide the {rows} x {in_features} "
                f"weights that tensor parallelism leaves to each rank of {stored} x "
                f"{load.in_features}; try a smaller --tensor-parallel-size"
            )


def _check_loaded(layer: Any) -> None:
    """Raise CheckpointError unless every tensor of a layer has come and is finite."""
    load: _Load = layer.aqlm_load
    parts = [*PARTS, "bias"] if getattr(layer, "bias", None) is not None else [*PARTS]
    missing = [
        f"{load.name([source])}.{part}"
        for part in parts
        for source in range(len(load.rows))
        if source not in load.done[part]
    ]
    require_loaded(load.prefix, missing, any(load.done.values()), [layer.scales])
    require_finite(layer, load.prefix, ("codebooks", "scales"))
    load.done.clear()  # weights can be reloaded, and are then counted anew


class AQLMLinearMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Runs any of vLLM's linear layers on AQLM weights, split over ranks as vLLM likes."""

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
        """Register empty parameters. Partition sizes are features of this rank, for P partitions.

        codes [rows/out_group, in/g, M], codebooks [P, M, 2^B, out_group, g] and scales
        [rows/out_group, 1, 1, 1]. Raises ServeError when groups do not divide a partition,
        CheckpointError when they do not even divide the whole layer.
        """
        from vllm.model_executor.parameter import (
            BasevLLMParameter,
            PackedColumnParameter,
            PackedvLLMParameter,
        )

        scheme, sizes = self.context.scheme, list(output_partition_sizes)
        total, loader = sum(sizes), MethodType(_load, layer)
        layer.aqlm_load = _Load(
            self.context,
            getattr(layer, "prefix", ""),
            _stored_rows(layer, sizes, output_size // total),
            input_size,
            extra_weight_attrs["weight_loader"],
        )
        _check_groups(layer.aqlm_load, sizes, input_size_per_partition)
        layer.aqlm_partition_sizes = sizes
        layer.weight_loader = loader  # the bias, which vLLM creates later, takes it from here
        packing = {"output_dim": 0, "packed_dim": 0, "packed_factor": scheme.out_group_size}
        codes = torch.zeros(
            scheme.codes_shape(total, input_size_per_partition), dtype=scheme.code_dtype
        )
        codebooks = torch.zeros(len(sizes), *scheme.codebooks_shape, dtype=params_dtype)
        scales = torch.full(scheme.scales_shape(total), torch.nan, dtype=params_dtype)
        parameters = {
            "codes": PackedvLLMParameter(input_dim=1, **packing, data=codes, weight_loader=loader),
            "codebooks": BasevLLMParameter(data=codebooks, weight_loader=loader),
            "scales": PackedColumnParameter(**packing, data=scales, weight_loader=loader),
        }
        for part, parameter in parameters.items():
            parameter.aqlm_part = part
            layer.register_parameter(part, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything was loaded, then pack it for the device's kernel.

        On a CPU without any kernel the weight is decoded. Raises CheckpointError that names the
        layer and what it lacks.
        """
        if not hasattr(layer, "codes"):
            return  # packed or decoded already
        _check_loaded(layer)
        # Plain ones from here: vLLM's subclasses serve loading and would slow down tracing.
        for part in PARTS:
            setattr(layer, part, Parameter(getattr(layer, part).data, requires_grad=False))
        layer.aqlm_packed = None
        layer.aqlm_decoded = decode_without_kernel(
            layer, self.context, layer.aqlm_load.prefix, layer.aqlm_partition_sizes
        )
        if not layer.aqlm_decoded and not self._pack(layer):
            let_lora_find(layer, layer.codes)

    def _pack(self, layer: Any) -> bool:
        """Put the kernel's layout in place of the checkpoint's; False if no kernel has one."""
        dtype = layer.codebooks.dtype  # vLLM's for parameters and activations
        codes, codebooks, scales = (getattr(layer, part).data for part in PARTS)
        packed = aqlm_pack(codes, codebooks, scales, dtype, layer.aqlm_partition_sizes)
        if packed is None:
            return False
        for part in PARTS:
            delattr(layer, part)
        layer.aqlm_packed_names = register_packed(layer, "packed", packed.tensors)
        layer.aqlm_packed = replace(packed, tensors=())
        packed.warm_up(dtype, getattr(layer, "bias", None) is not None)
        let_lora_find(layer, getattr(layer, layer.aqlm_packed_names[0]))
        return True

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x, on this rank's part of the weight."""
        # No branch on the shape of x here: torch.compile traces this once for all batch sizes.
        if layer.aqlm_decoded:
            return F.linear(x, layer.weight, bias)
        if layer.aqlm_packed is not None:
            # Looked up anew: vLLM may have moved the parameters (offloading, sleep mode).
            tensors = tuple([getattr(layer, name) for name in layer.aqlm_packed_names])
            return aqlm_packed_linear(x, replace(layer.aqlm_packed, tensors=tensors), bias)
        sizes: list[int] = layer.aqlm_partition_sizes
        return aqlm_linear(x, layer.codes, layer.codebooks, layer.scales, bias, sizes)
