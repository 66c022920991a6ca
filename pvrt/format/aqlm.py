"""The AQLM layout on disk: validate and read.

Per quantised linear layer NAME (arXiv 2401.06118 and its published checkpoints):

    NAME.codes      [out/out_group, in/g, M]    int8 (B <= 8) or int16, two's-complement wrap
    NAME.codebooks  [M, 2^B, out_group, g]      the model's floating type
    NAME.scales     [out/out_group, 1, 1, 1]    the model's floating type
    NAME.bias       [out]                       only where the layer has one
    NAME.in_scales  [in]                        only in checkpoints of several schemes, see below

An embedding in codes has the same tensors, out being its vocabulary. It and an output head may have
in_scales, which multiply the columns of what the codes decode to. No published checkpoint has
either. Everything else is a plain tensor; config.json says the schemes (config_block.py).
`pvrt.json` is ours and optional.
Checkpoints are data: safetensors only, and everything read is checked before it is used.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pvrt.errors import CheckpointError
from pvrt.format.config_block import CONFIG_FILE, LayerSchemes, parse_quantization_config
from pvrt.format.folder import (
    LayerInfo,
    StoredModel,
    TensorInfo,
    in_block,
    read_json_object,
)
from pvrt.format.scheme import Scheme

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: The tensors that a layer in codes cannot do without.
PARTS = ("codes", "codebooks", "scales")

_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# int8 and int16 are what is published; the wider ones decode the same after a range check.
_INTEGERS = {"I8": 8, "U8": 8, "I16": 16, "I32": 32}


@dataclass(frozen=True)
class QuantizedLayer:
    """The tensors of one quantised layer, in checkpoint layout."""

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    bias: Tensor | None = None
    in_scales: Tensor | None = None

    def named(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """(tensor name, tensor) pairs as they are stored."""
        yield f"{name}.codes", self.codes
        yield f"{name}.codebooks", self.codebooks
        yield f"{name}.scales", self.scales
        if self.bias is not None:
            yield f"{name}.bias", self.bias
        if self.in_scales is not None:
            yield f"{name}.in_scales", self.in_scales


@dataclass(frozen=True)
class Checkpoint(StoredModel):
    """An opened, header-checked AQLM checkpoint. Tensors are read (and checked) one at a time."""

    PARTS = (*PARTS, "in_scales")

    @classmethod
    def open(cls, path: str | Path, config: dict[str, Any] | None = None) -> "Checkpoint":
        """Open a checkpoint folder and check config and headers, reading no weights.

        config is the folder's config.json where it has been read. Raises CheckpointError with one
        sentence that names the file and the tensor.
        """
        folder = Path(path)
        config = read_config(folder) if config is None else config
        quantization = config.get("quantization_config")
        where = folder / CONFIG_FILE
        if not isinstance(quantization, dict):
            raise CheckpointError(f"{where} has no quantization_config: not an AQLM checkpoint")
        schemes = parse_quantization_config(quantization, str(where))
        tensors = read_tensors(folder)
        layers = find_layers(tensors, schemes)
        if not layers:
            raise CheckpointError(f"{folder} says quant_method aqlm but holds no codes tensor")
        return cls(folder, config, layers, tensors)

    def read_layer(self, name: str) -> QuantizedLayer:
        """Read one quantised layer; its codes are range-checked, in `code_dtype` of its scheme."""
        if name not in self.layers:
            raise CheckpointError(f"{self.path} has no quantised layer {name}")
        info, scheme = self.tensors[f"{name}.codes"], self.layers[name].scheme
        assert isinstance(scheme, Scheme)
        codes = check_codes(self.read(f"{name}.codes"), scheme, f"{info.file}: {name}.codes")
        return QuantizedLayer(
            codes,
            self.read(f"{name}.codebooks"),
            self.read(f"{name}.scales"),
            self.read(f"{name}.bias") if self.layers[name].has_bias else None,
            self.read(f"{name}.in_scales") if self.layers[name].has_in_scales else None,
        )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises CheckpointError when it is missing or no JSON object, and for a folder that holds pipes
    or devices, which readers of its other files would wait for without end.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that holds {CONFIG_FILE}")
    for entry in sorted(folder.iterdir()):
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise CheckpointError(f"{entry} is neither a file nor a folder")
    config = read_json_object(folder / CONFIG_FILE)
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{folder / CONFIG_FILE}: architectures must be a list of names")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: the single file, or all shards that the index names."""
    return sorted({info.file for info in read_tensors(folder).values()})


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Headers of all tensors of a folder, each file read once and the index checked against them.

    Raises CheckpointError for a missing or damaged file and for an index that is wrong.
    """
    index, single = folder / INDEX_FILE, folder / WEIGHTS_FILE
    if single.is_file() and not index.is_file():
        return read_headers([single])
    if not index.is_file():
        raise CheckpointError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    names = sorted({str(value) for value in weight_map.values()})
    if single.is_file() and names != [WEIGHTS_FILE]:
        raise CheckpointError(
            f"{folder} holds {WEIGHTS_FILE} and {INDEX_FILE}, which names other files; remove the "
            "one that is not of this model"
        )
    files = []
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}, which is not a safetensors file name")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is missing from {folder}")
        files.append(folder / name)
    headers = read_headers(files)
    for tensor, name in weight_map.items():
        if tensor not in headers or headers[tensor].file.name != name:
            raise CheckpointError(f"{index} says that {tensor} is in {name}, but it is not")
    return headers


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Headers of all tensors. Raises CheckpointError for a damaged file or a doubled name."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (a handle is not a mapping)
                    if name in tensors:
                        raise CheckpointError(f"{name} is in {tensors[name].file} and in {file}")
                    view = handle.get_slice(name)
                    tensors[name] = TensorInfo(file, view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is damaged or cut short ({error}); copy or download it again"
            ) from error
    return tensors


def find_layers(tensors: Mapping[str, TensorInfo], schemes: LayerSchemes) -> dict[str, LayerInfo]:
    """Layers in codes in a set of headers, every shape and type checked against its scheme."""
    names = sorted(name.removesuffix(".codes") for name in tensors if name.endswith(".codes"))
    for name, info in tensors.items():
        stem, _, last = name.rpartition(".")
        if last == "codebooks" and f"{stem}.codes" not in tensors:
            raise CheckpointError(f"{info.file}: {name} has no {stem}.codes beside it")
    for name in schemes.named:
        if f"{name}.codes" not in tensors:
            raise CheckpointError(f"{CONFIG_FILE} has a scheme for {name}, whose codes are missing")
    return {name: _check_layer(name, tensors, schemes) for name in names}


def _check_layer(name: str, tensors: Mapping[str, TensorInfo], schemes: LayerSchemes) -> LayerInfo:
    codes, scheme = tensors[f"{name}.codes"], schemes.of(name)
    if scheme is None:
        raise CheckpointError(f"{codes.file}: {CONFIG_FILE} has no scheme for {name}.codes")
    for part in PARTS:
        if f"{name}.{part}" not in tensors:
            raise CheckpointError(f"{codes.file}: {name}.codes has no {name}.{part} beside it")
    if codes.dtype not in _INTEGERS:
        raise CheckpointError(f"{codes.file}: {name}.codes is {codes.dtype}, not an integer type")
    if len(codes.shape) != 3 or codes.shape[2] != scheme.num_codebooks or 0 in codes.shape:
        raise CheckpointError(
            f"{codes.file}: {name}.codes has shape {list(codes.shape)}, scheme {scheme} needs "
            f"[rows, groups, {scheme.num_codebooks}]"
        )
    out_features = codes.shape[0] * scheme.out_group_size
    in_features = codes.shape[1] * scheme.in_group_size
    if f"{name}.in_scales" in tensors and in_block(name):
        raise CheckpointError(
            f"{codes.file}: {name} has in_scales, which only embeddings and output heads may have; "
            "keep that layer dense"
        )
    if f"{name}.in_scales" in tensors and schemes.default is not None:
        raise CheckpointError(
            f"{codes.file}: {name} has in_scales, which readers of one scheme for all layers would "
            f"leave out; list the layers of every scheme in {CONFIG_FILE}, under schemes"
        )
    optional = [part for part in ("bias", "in_scales") if f"{name}.{part}" in tensors]
    for part in ("codebooks", "scales", *optional):
        info, shape = tensors[f"{name}.{part}"], scheme.part_shape(part, out_features, in_features)
        if info.dtype not in _FLOATS:
            raise CheckpointError(f"{info.file}: {name}.{part} is {info.dtype}, not a float type")
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: {name}.{part} has shape {list(info.shape)}, scheme {scheme} and "
                f"{name}.codes need {list(shape)}"
            )
    has_bias, has_in_scales = (part in optional for part in ("bias", "in_scales"))
    return LayerInfo(name, out_features, in_features, has_bias, scheme, has_in_scales)


def check_codes(codes: Tensor, scheme: Scheme, where: str) -> Tensor:
    """Range-check codes and return them in `scheme.code_dtype` (wrapped).

    Legal are unsigned indices and their two's-complement wrap, so any v with
    -2^(B-1) <= v < 2^B. Raises CheckpointError naming `where` and the offending value.
    """
    if codes.dtype == scheme.code_dtype and scheme.nbits_per_codebook in (8, 16):
        return codes  # every value of the type is a legal code
    low, high = (int(value) for value in codes.aminmax())
    half, size = scheme.codebook_size // 2, scheme.codebook_size
    if low < -half or high >= size:
        worst = low if low < -half else high
        raise CheckpointError(
            f"{where} holds code {worst}, a codebook of {scheme} has entries 0 to {size - 1}"
        )
    if codes.dtype == scheme.code_dtype:
        return codes
    return codes.to(scheme.code_dtype)  # narrowing an integer wraps, as the layout does
