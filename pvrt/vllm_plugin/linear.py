"""AQLM weights in vLLM's linear layers.

vLLM fuses layers (q, k and v; gate and up) and splits them over ranks; every source layer keeps its
own codebooks, complete on every rank. Neighbouring source layers of one scheme are one weight; a
layer of several schemes has several, and its outputs are theirs side by side.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from pvrt.errors import CheckpointError, ServeError
from pvrt.format.aqlm import PARTS
from pvrt.format.config_block import CONFIG_FILE
from pvrt.format.scheme import Scheme
from pvrt.vllm_plugin.context import Context
from pvrt.vllm_plugin.product import Product
from pvrt.vllm_plugin.weights import (
    checked,
    dense_in_quantised,
    let_lora_find,
    register_part,
    require_finite,
    require_loaded,
)

_QKV = {"q": 0, "k": 1, "v": 2}

# Which source layers of a fused layer a tensor holds: one of q, k and v; one or several by number;
# None where the checkpoint itself stores the layer fused (or it is not fused at all).
ShardId = str | int | tuple[int, ...] | None


@dataclass(frozen=True)
class _Source:
    """A source layer: its name and scheme, and output features in the checkpoint and of a rank."""

    name: str
    scheme: Scheme
    stored: int
    rows: int


@dataclass(frozen=True)
class _Run:
    """Neighbouring sources of one scheme, numbers `first` and on.

    Their weight's parameters are named "codes", "codebooks" and "scales"; those of a second run
    end with "_1" and so on.
    """

    scheme: Scheme
    first: int
    sizes: list[int]
    suffix: str


def _runs(sources: Sequence[_Source]) -> list[_Run]:
    runs: list[_Run] = []
    first = 0
    for scheme, group in groupby(sources, lambda source: source.scheme):
        sizes = [source.rows for source in group]
        runs.append(_Run(scheme, first, sizes, f"_{len(runs)}" if runs else ""))
        first += len(sizes)
    return runs


@dataclass
class _Load:
    """What a layer expects from the checkpoint, and what has come so far.

    `stored_in` are its inputs as stored, `in_features` those of a rank. `done` has, per part, the
    numbers of the sources that came.
    """

    prefix: str
    sources: list[_Source]
    runs: list[_Run]
    stored_in: int
    in_features: int
    done: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def numbers(self, shard: ShardId) -> list[int]:
        """Numbers of the source layers that a tensor holds."""
        if shard is None:
            return list(range(len(self.sources)))
        if isinstance(shard, tuple):
            return list(shard)
        return [_QKV[shard] if isinstance(shard, str) else shard]

    def name(self, numbers: list[int]) -> str:
        """Name of one source layer in the checkpoint, or of the whole layer."""
        return self.sources[numbers[0]].name if len(numbers) == 1 else self.prefix

    def run(self, numbers: list[int]) -> _Run:
        """The run of source layers. Raises CheckpointError if they belong to several."""
        runs = [
            run
            for run in self.runs
            if any(run.first <= n < run.first + len(run.sizes) for n in numbers)
        ]
        if len(runs) > 1:
            raise CheckpointError(
                f"the checkpoint stores {self.prefix} as one layer, to parts of which {CONFIG_FILE}"
                " gives different schemes"
            )
        return runs[0]

    def copy(self, target: Tensor, part: str, stored: Tensor, numbers: list[int], at: Any) -> None:
        """Copy a rank's share of codes or scales; `at` is the layer, which knows its rank."""
        run, start = self.run(numbers), 0
        group = run.scheme.out_group_size
        for number in numbers:
            source = self.sources[number]
            height, rows = source.stored // group, source.rows // group
            share = stored[start : start + height]
            start += height
            # Where there are more ranks than k and v heads, several ranks hold the same head.
            place = at.tp_rank * (height // rows) // at.tp_size
            share = share[place * rows : (place + 1) * rows]
            if part == "codes":
                width = self.in_features // run.scheme.in_group_size
                place = at.tp_rank * (share.shape[1] // width) // at.tp_size
                share = share[:, place * width : (place + 1) * width]
            first = sum(run.sizes[: number - run.first]) // group
            target[first : first + rows].copy_(share)


def _load(layer: Any, param: Any, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
    """Check and copy one tensor of a quantised layer: the weight_loader of all its parameters.

    vLLM looks parameters up by the names in the checkpoint, and so finds the first run's. Bound to
    its layer as a method, not held in a closure: vLLM keeps the loaders of all parameters in a
    global table for reloading and cuts only bound methods loose, so that a model can be freed.
    """
    load: _Load = layer.aqlm_load
    numbers = load.numbers(loaded_shard_id)
    name = load.name(numbers)
    if param is layer:  # vLLM's fused layers pass themselves for a name that they do not have
        raise dense_in_quantised(name)
    part = getattr(param, "aqlm_part", "bias")  # a bias is vLLM's own parameter
    rows = sum(load.sources[number].stored for number in numbers)
    run = load.runs[0] if part == "bias" else load.run(numbers)
    shape = run.scheme.part_shape(part, rows, load.stored_in)
    stored = checked(run.scheme, name, part, loaded_weight, shape)
    if part == "bias":
        shard = () if loaded_shard_id is None else (loaded_shard_id,)
        type(layer).weight_loader(layer, param, stored, *shard)
    else:
        target = getattr(layer, f"{part}{run.suffix}").data
        if part == "codebooks":
            for number in numbers:
                target[number - run.first].copy_(stored)
        else:
            load.copy(target, part, stored, numbers, layer)
    load.done[part].update(numbers)


def _stored_rows(layer: Any, partition_sizes: list[int], ranks: int) -> list[int]:
    """Output features of every source layer in the checkpoint, before the split over ranks."""
    copies = getattr(layer, "num_kv_head_replicas", 1)
    return [
        rows * ranks // (copies if number else 1) for number, rows in enumerate(partition_sizes)
    ]


def _check_groups(load: _Load) -> None:
    for source in load.sources:
        scheme, stored = source.scheme, (source.stored, load.stored_in)
        if not scheme.divides(*stored):
            raise CheckpointError(
                f"{load.prefix}: groups of {scheme} do not divide its {stored[0]} x {stored[1]} "
                f"weights; if it is dense, {CONFIG_FILE} must list it in "
                "linear_weights_not_to_quantize"
            )
        if not scheme.divides(source.rows, load.in_features):
            raise ServeError(
                f"{load.prefix}: groups of {scheme} do not divide the {source.rows} x "
                f"{load.in_features} weights that tensor parallelism leaves to each rank of "
                f"{stored[0]} x {stored[1]}; try a smaller --tensor-parallel-size"
            )


def _check_loaded(layer: Any) -> None:
    """Raise CheckpointError unless every tensor of a layer has come and is finite."""
    load: _Load = layer.aqlm_load
    parts = [*PARTS, "bias"] if getattr(layer, "bias", None) is not None else [*PARTS]
    missing = [
        f"{source.name}.{part}"
        for part in parts
        for number, source in enumerate(load.sources)
        if number not in load.done[part]
    ]
    scales = [getattr(layer, f"scales{run.suffix}") for run in load.runs]
    require_loaded(load.prefix, missing, any(load.done.values()), scales)
    floats = [f"{part}{run.suffix}" for run in load.runs for part in PARTS[1:]]
    require_finite(layer, load.prefix, floats)
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
        """Register empty parameters. Partition sizes are features of this rank.

        For every run of P partitions: codes [rows/out_group, in/g, M], codebooks [P, M, 2^B,
        out_group, g] and scales [rows/out_group, 1, 1, 1]. Raises ServeError when groups do not
        divide a partition, CheckpointError when they do not even divide the whole layer, or when
        the checkpoint names no scheme for it.
        """
        sizes, loader = list(output_partition_sizes), MethodType(_load, layer)
        layers = self.context.layers
        named = layers.sources(layer.prefix, self.context.fused, len(sizes))
        stored = _stored_rows(layer, sizes, output_size // sum(sizes))
        sources = [
            _Source(name, scheme, *rows)
            for (name, scheme), *rows in zip(named, stored, sizes, strict=True)
        ]
        layer.aqlm_load = load = _Load(
            layers.local(layer.prefix),
            sources,
            _runs(sources),
            input_size,
            input_size_per_partition,
        )
        _check_groups(load)
        layer.weight_loader = loader  # the bias, which vLLM creates later, takes it from here
        for run in load.runs:
            for part in PARTS:
                shape = run.scheme.part_shape(part, sum(run.sizes), input_size_per_partition)
                if part == "codebooks":
                    shape = len(run.sizes), *shape
                name = f"{part}{run.suffix}"
                register_part(layer, name, part, shape, run.scheme, params_dtype, loader)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything was loaded, then pack it for the device's kernel.

        On a CPU without any kernel the weight is decoded. Raises CheckpointError that names the
        layer and what it lacks.
        """
        if not hasattr(layer, "codes"):
            return  # packed or decoded already
        self.context.layers.require_used()
        _check_loaded(layer)
        layer.aqlm_products = []
        for run in layer.aqlm_load.runs:
            stored = Product.as_stored(run.sizes, run.suffix)
            best = stored.prepared(layer, layer.prefix, run.scheme, self.context.notice)
            if best is not stored:
                stored.drop(layer)
            layer.aqlm_products.append(best)
        let_lora_find(layer, getattr(layer, layer.aqlm_products[0].names[0]))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x, on this rank's part of the weight."""
        products: list[Product] = layer.aqlm_products
        if len(products) == 1:
            return products[0].linear(layer, x, bias)
        y = torch.cat([product.linear(layer, x, None) for product in products], -1)
        return y if bias is None else y + bias
