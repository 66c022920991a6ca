"""The layout of scalar grids on disk: compressed-tensors, format "pack-quantized".

transformers (with the compressed-tensors package) and vLLM read it without pvrt. Per quantised
linear layer NAME, with codes q and zeros z of `bits` bits, 32 // bits of them in an int32, the
first lowest:

    NAME.weight_packed      [out, words of in]       int32
    NAME.weight_scale       [out, in/G]              the model's floating type
    NAME.weight_zero_point  [words of out, in/G]     int32, asymmetric grids only
    NAME.weight_shape       [2]                      int64: out, in
    NAME.bias               [out]                    only where the layer has one

The weight is weight_scale * (q - z), z = 2^(bits-1) for symmetric grids.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvrt.errors import CheckpointError
from pvrt.format.aqlm import Checkpoint, read_config, read_tensors
from pvrt.format.config_block import CONFIG_FILE, is_aqlm
from pvrt.format.folder import LayerInfo, StoredModel, TensorInfo
from pvrt.format.scheme import GridScheme

METHOD = "compressed-tensors"
_FORMAT = "pack-quantized"
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class GridLayer:
    """One layer on a grid: codes [out, in] and zeros [out, in/G] uint8 (None: symmetric), scales
    [out, in/G], bias [out] or None."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None = None

    def named(self, name: str, scheme: GridScheme) -> Iterator[tuple[str, Tensor]]:
        """(tensor name, tensor) pairs as they are stored."""
        yield f"{name}.weight_packed", pack(self.codes, scheme.bits)
        yield f"{name}.weight_scale", self.scales
        if self.zeros is not None:
            yield f"{name}.weight_zero_point", pack(self.zeros.T, scheme.bits).T.contiguous()
        yield f"{name}.weight_shape", torch.tensor(self.codes.shape)
        if self.bias is not None:
            yield f"{name}.bias", self.bias


@dataclass(frozen=True)
class GridCheckpoint(StoredModel):
    """An opened, header-checked checkpoint of grids. Tensors are read one at a time."""

    scheme: GridScheme

    PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    @classmethod
    def open(cls, path: str | Path, config: dict[str, Any] | None = None) -> "GridCheckpoint":
        """Open a checkpoint folder and check config and headers, reading no weights.

        config is the folder's config.json where it has been read. Raises CheckpointError with one
        sentence that names the file and the tensor.
        """
        folder = Path(path)
        config = read_config(folder) if config is None else config
        where = str(folder / CONFIG_FILE)
        scheme = parse_grid_config(config.get("quantization_config"), where)
        tensors = read_tensors(folder)
        layers = _find_layers(tensors, scheme)
        if not layers:
            raise CheckpointError(f"{folder} says quant_method {METHOD} but holds no packed weight")
        return cls(folder, config, layers, tensors, scheme)

    def read_layer(self, name: str) -> GridLayer:
        """Read and unpack one quantised layer."""
        if name not in self.layers:
            raise CheckpointError(f"{self.path} has no quantised layer {name}")
        info, bits = self.layers[name], self.scheme.bits
        shape = self.read(f"{name}.weight_shape").tolist()
        if shape != [info.out_features, info.in_features]:
            file = self.tensors[f"{name}.weight_shape"].file
            raise CheckpointError(
                f"{file}: {name}.weight_shape says {shape}, the scales are those of "
                f"{info.out_features} x {info.in_features}"
            )
        zeros = None
        if not self.scheme.symmetric:
            packed = self.read(f"{name}.weight_zero_point")
            zeros = unpack(packed.T, bits, info.out_features).T.contiguous()
        return GridLayer(
            unpack(self.read(f"{name}.weight_packed"), bits, info.in_features),
            self.read(f"{name}.weight_scale"),
            zeros,
            self.read(f"{name}.bias") if info.has_bias else None,
        )


def open_checkpoint(
    path: str | Path, config: dict[str, Any] | None = None
) -> Checkpoint | GridCheckpoint:
    """Open a checkpoint of additive codebooks or of grids. Raises CheckpointError.

    config is the folder's config.json where it has been read.
    """
    config = read_config(Path(path)) if config is None else config
    if is_packed(config):
        return GridCheckpoint.open(path, config)
    return Checkpoint.open(path, config)


def open_folder(path: str | Path) -> StoredModel:
    """Open any model folder: a checkpoint as `open_checkpoint` does, or a dense model.

    Reads config.json and every header once. Raises CheckpointError.
    """
    folder = Path(path)
    config = read_config(folder)
    if is_quantised(config):
        return open_checkpoint(folder, config)
    return StoredModel(folder, config, {}, read_tensors(folder))


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json says that it is in the compressed-tensors layout."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that the folder holds what `open_checkpoint` reads."""
    return is_aqlm(config) or is_packed(config)


def grid_config(scheme: GridScheme, dense_linears: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` block to write; `dense_linears` are module names."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {
        "quant_method": METHOD,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": sorted(dense_linears),
    }


def parse_grid_config(quantization: Any, where: str) -> GridScheme:
    """The grid in a `quantization_config` block. `where` names the file in errors.

    Raises CheckpointError for another method, format or kind of quantisation: of what
    compressed-tensors can say, pvrt reads one group of weights on integer grids.
    """
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise CheckpointError(f"{where} does not say quant_method {METHOD}")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise CheckpointError(
            f"{where}: pvrt reads {METHOD} with exactly one entry in config_groups"
        )
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"{where}: config_groups says nothing of weights")
    wanted = {"type": "int", "strategy": "group"}
    found = {"format": quantization.get("format"), **{key: weights.get(key) for key in wanted}}
    if found != {"format": _FORMAT, **wanted} or group.get("input_activations"):
        said = ", ".join(f"{key} {value!r}" for key, value in found.items())
        raise CheckpointError(
            f"{where}: {said}; pvrt reads packed integer grids per group of weights "
            f"(format {_FORMAT!r}) and nothing for activations"
        )
    if weights.get("actorder") not in (None, "weight", "static"):
        raise CheckpointError(f"{where}: actorder {weights['actorder']!r} reorders inputs")
    try:
        return GridScheme(
            weights.get("num_bits", 0),
            weights.get("group_size", 0),
            bool(weights.get("symmetric", True)),
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: quantization_config: {error}") from error


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack uint8 values below 2^bits, [rows, n] -> int32 [rows, ceil(n / (32 // bits))]."""
    count = 32 // bits
    rows, columns = values.shape
    words = torch.zeros(rows, -(-columns // count) * count, dtype=torch.int64, device=values.device)
    words[:, :columns] = values
    shifts = bits * torch.arange(count, device=values.device)
    packed = (words.view(rows, -1, count) << shifts).sum(2)
    # Two's complement of what exceeds 2^31; a plain cast of such a number is not defined.
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The first `columns` values of every row of packed words, uint8 [rows, columns]."""
    shifts = bits * torch.arange(32 // bits, dtype=torch.int32, device=words.device)
    values = (words.unsqueeze(2) >> shifts) & ((1 << bits) - 1)
    return values.flatten(1)[:, :columns].to(torch.uint8)


def _find_layers(tensors: Mapping[str, TensorInfo], scheme: GridScheme) -> dict[str, LayerInfo]:
    """Quantised layers in a set of headers, every shape and type checked against the scheme."""
    suffix = ".weight_packed"
    names = sorted(name.removesuffix(suffix) for name in tensors if name.endswith(suffix))
    return {name: _check_layer(name, tensors, scheme) for name in names}


def _check_layer(name: str, tensors: Mapping[str, TensorInfo], scheme: GridScheme) -> LayerInfo:
    file = tensors[f"{name}.weight_packed"].file
    scale = tensors.get(f"{name}.weight_scale")
    if scale is None or len(scale.shape) != 2 or 0 in scale.shape:
        raise CheckpointError(
            f"{file}: {name}.weight_packed needs {name}.weight_scale [out, groups] beside it"
        )
    out_features, in_features = scale.shape[0], scale.shape[1] * scheme.group_size
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "weight_packed": (("I32",), scheme.packed_shape(out_features, in_features)),
        "weight_scale": (_FLOATS, scale.shape),
        "weight_shape": (("I64",), (2,)),
    }
    if not scheme.symmetric:
        shape = scheme.packed_zeros_shape(out_features, in_features)
        wanted["weight_zero_point"] = (("I32",), shape)
    has_bias = f"{name}.bias" in tensors
    if has_bias:
        wanted["bias"] = (_FLOATS, (out_features,))
    for part, (dtypes, expected) in wanted.items():
        info = tensors.get(f"{name}.{part}")
        if info is None:
            raise CheckpointError(f"{file}: {name}.weight_packed has no {name}.{part} beside it")
        if info.dtype not in dtypes or info.shape != expected:
            raise CheckpointError(
                f"{info.file}: {name}.{part} is {info.dtype} {list(info.shape)}, scheme {scheme} "
                f"needs {' or '.join(dtypes)} {list(expected)}"
            )
    return LayerInfo(name, out_features, in_features, has_bias, scheme)
