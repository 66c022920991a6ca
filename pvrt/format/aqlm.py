"""The AQLM layout on disk: validate, read and write.

Per quantised linear layer NAME (arXiv 2401.06118 and its published checkpoints):

    NAME.codes      [out/out_group, in/g, M]    int8 (B <= 8) or int16, two's-complement wrap
    NAME.codebooks  [M, 2^B, out_group, g]      the model's floating type
    NAME.scales     [out/out_group, 1, 1, 1]    the model's floating type
    NAME.bias       [out]                       only where the layer has one

Everything else is a plain tensor; config.json says the scheme. `pvrt.json` is ours and optional.
Checkpoints are data: safetensors only, and everything read is checked before it is used.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pvrt.errors import CheckpointError
from pvrt.format.atomic import as_json, sync, write_synced
from pvrt.format.folder import LayerInfo as LayerInfo
from pvrt.format.folder import StoredModel
from pvrt.format.folder import TensorInfo as TensorInfo
from pvrt.format.scheme import Scheme

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "pvrt.json"
FORMAT_VERSION = 1

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

    def named(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """(tensor name, tensor) pairs as they are stored."""
        yield f"{name}.codes", self.codes
        yield f"{name}.codebooks", self.codebooks
        yield f"{name}.scales", self.scales
        if self.bias is not None:
            yield f"{name}.bias", self.bias


@dataclass(frozen=True)
class Checkpoint(StoredModel):
    """An opened, header-checked AQLM checkpoint. Tensors are read (and checked) one at a time."""

    scheme: Scheme

    PARTS = ("codes", "codebooks", "scales")

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
        scheme = parse_quantization_config(quantization, str(where))
        tensors = read_tensors(folder)
        layers = find_layers(tensors, scheme)
        if not layers:
            raise CheckpointError(f"{folder} says quant_method aqlm but holds no codes tensor")
        return cls(folder, config, layers, tensors, scheme)

    def read_layer(self, name: str) -> QuantizedLayer:
        """Read one quantised layer; codes are range-checked and come in `scheme.code_dtype`."""
        if name not in self.layers:
            raise CheckpointError(f"{self.path} has no quantised layer {name}")
        info = self.tensors[f"{name}.codes"]
        codes = check_codes(self.read(f"{name}.codes"), self.scheme, f"{info.file}: {name}.codes")
        return QuantizedLayer(
            codes,
            self.read(f"{name}.codebooks"),
            self.read(f"{name}.scales"),
            self.read(f"{name}.bias") if self.layers[name].has_bias else None,
        )

    def layer_bits(self, layer: LayerInfo) -> int:
        """Bits of one quantised layer, codebooks and scales included."""
        float_bits = self.tensors[f"{layer.name}.codebooks"].float_bits
        return self.scheme.layer_bits(layer.out_features, layer.in_features, float_bits)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises CheckpointError when missing or not a JSON object."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that holds {CONFIG_FILE}")
    return _read_json_object(folder / CONFIG_FILE)


def _read_json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} is missing: not a model folder, or not written to its end"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, found {type(value).__name__}")
    return value


def is_aqlm(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json says that it is an AQLM checkpoint."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "aqlm"


def parse_quantization_config(quantization: Mapping[str, Any], where: str) -> Scheme:
    """The scheme in a `quantization_config` block. `where` names the file in errors.

    Raises CheckpointError for a foreign method, a missing key or an impossible value.
    """
    method = quantization.get("quant_method")
    if str(method).lower() != "aqlm":
        raise CheckpointError(f"{where}: quant_method is {method!r}, pvrt reads 'aqlm'")
    required = ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size")
    missing = [key for key in required if key not in quantization]
    if missing:
        raise CheckpointError(f"{where}: quantization_config lacks {', '.join(missing)}")
    try:
        scheme = Scheme(*(quantization[key] for key in required))
    except ValueError as error:
        raise CheckpointError(f"{where}: quantization_config: {error}") from error
    skipped_modules(quantization, where)
    return scheme


def skipped_modules(quantization: Mapping[str, Any], where: str = CONFIG_FILE) -> list[str]:
    """Module names that the config keeps dense, from any published spelling.

    Entries are module names, tensor names ("lm_head.weight") or anchored ("mlp.gate$").
    Raises CheckpointError when the list is not a list of strings.
    """
    names: dict[str, None] = {}
    for key in ("linear_weights_not_to_quantize", "modules_to_not_convert"):
        entries = quantization.get(key) or []
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise CheckpointError(f"{where}: {key} must be a list of strings")
        for entry in entries:
            names[entry.removesuffix("$").removesuffix(".weight")] = None
    return list(names)


def quantization_config(
    scheme: Scheme, dense_linears: Iterable[str], quantized: Iterable[str]
) -> dict[str, Any]:
    """The `quantization_config` block to write.

    Dense linears are listed by tensor name (transformers 4 tests those) and by module name
    (transformers 5 does). Version 5 treats an entry as the start of a pattern, so a name that also
    starts a quantised one ("mlp.gate", "mlp.gate_proj") is written with an anchor.
    """
    quantized = list(quantized)
    skip = []
    for name in dense_linears:
        clash = any(other.startswith(name) for other in quantized)
        skip += [f"{name}$" if clash else name, f"{name}.weight"]
    return {
        "quant_method": "aqlm",
        "num_codebooks": scheme.num_codebooks,
        "nbits_per_codebook": scheme.nbits_per_codebook,
        "in_group_size": scheme.in_group_size,
        "out_group_size": scheme.out_group_size,
        "linear_weights_not_to_quantize": skip,
    }


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: the single file, or all shards that the index names."""
    return sorted({info.file for info in read_tensors(folder).values()})


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Headers of all tensors of a folder, each file read once and the index checked against them.

    Raises CheckpointError for a missing or damaged file and for an index that is wrong.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return read_headers([folder / WEIGHTS_FILE])
    index = folder / INDEX_FILE
    if not index.is_file():
        raise CheckpointError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    weight_map = _read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    files = []
    for name in sorted({str(value) for value in weight_map.values()}):
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


def find_layers(tensors: Mapping[str, TensorInfo], scheme: Scheme) -> dict[str, LayerInfo]:
    """Quantised layers in a set of headers, every shape and type checked against the scheme."""
    names = sorted(name.removesuffix(".codes") for name in tensors if name.endswith(".codes"))
    for name, info in tensors.items():
        stem, _, last = name.rpartition(".")
        if last == "codebooks" and f"{stem}.codes" not in tensors:
            raise CheckpointError(f"{info.file}: {name} has no {stem}.codes beside it")
    return {name: _check_layer(name, tensors, scheme) for name in names}


def _check_layer(name: str, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> LayerInfo:
    codes = tensors[f"{name}.codes"]
    for part in ("codebooks", "scales"):
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
    shapes: dict[str, tuple[int, ...]] = {
        "codebooks": scheme.codebooks_shape,
        "scales": scheme.scales_shape(out_features),
    }
    has_bias = f"{name}.bias" in tensors
    if has_bias:
        shapes["bias"] = (out_features,)
    for part, shape in shapes.items():
        info = tensors[f"{name}.{part}"]
        if info.dtype not in _FLOATS:
            raise CheckpointError(f"{info.file}: {name}.{part} is {info.dtype}, not a float type")
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: {name}.{part} has shape {list(info.shape)}, scheme {scheme} and "
                f"{name}.codes need {list(shape)}"
            )
    return LayerInfo(name, out_features, in_features, has_bias)


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


@dataclass(frozen=True)
class WriteOptions:
    """How to write: bytes per shard, other files beside the weights, and what pvrt.json says."""

    max_shard_bytes: int = 4 << 30
    files: Mapping[str, bytes] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)


def write_checkpoint(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    options: WriteOptions | None = None,
) -> None:
    """Write a checkpoint folder; `config` already holds its `quantization_config`.

    Everything is first written and synced in a staging folder inside `path`; only then files move
    into place, config.json last. A folder whose writing was cut short therefore has no config.json
    and is refused by readers, and a full disk leaves what was there before untouched.
    Raises CheckpointError when the disk refuses.
    """
    options = options or WriteOptions()
    folder = Path(path)
    staging = folder / ".staging"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        shards, hashes = _stage_shards(staging, tensors, options.max_shard_bytes)
        manifest = {"format_version": FORMAT_VERSION, **options.manifest, "tensor_sha256": hashes}
        documents = {MANIFEST_FILE: manifest, CONFIG_FILE: dict(config)}
        if len(shards) > 1:
            documents[INDEX_FILE] = _index(shards, staging)
        files = {name: as_json(value) for name, value in documents.items()}
        for name, content in {**options.files, **files}.items():
            write_synced(staging / name, content)
        _commit(staging, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the checkpoint to {folder} ({error}); free some space and run the same "
            "command again"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _stage_shards(
    staging: Path, tensors: Iterable[tuple[str, Tensor]], max_bytes: int
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Write shards. Returns {file name: tensor names} and {tensor name: sha256}."""
    shards: list[list[str]] = []
    hashes: dict[str, str] = {}
    pending: dict[str, Tensor] = {}
    pending_bytes = 0

    def flush() -> None:
        file = staging / f"shard-{len(shards):05d}"
        save_file(pending, file, metadata={"format": "pt"})
        sync(file)
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if name in hashes:
            raise ValueError(f"tensor {name} was given twice")
        tensor = tensor.detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > max_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor
        pending_bytes += size
        hashes[name] = tensor_sha256(tensor)
    flush()
    named = {}
    for number, names in enumerate(shards):
        final = WEIGHTS_FILE
        if len(shards) > 1:
            final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(staging / f"shard-{number:05d}", staging / final)
        named[final] = names
    return named, hashes


def _index(shards: Mapping[str, list[str]], staging: Path) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum((staging / file).stat().st_size for file in shards)},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }


def _commit(staging: Path, folder: Path) -> None:
    with suppress(FileNotFoundError):
        (folder / CONFIG_FILE).unlink()
    # A file of an earlier save with another number of shards would be read in place of the new.
    for stale in [folder / INDEX_FILE, *folder.glob("model*.safetensors")]:
        with suppress(FileNotFoundError):
            stale.unlink()
    files = sorted(staging.iterdir(), key=lambda file: file.name == CONFIG_FILE)
    for file in files:
        os.replace(file, folder / file.name)
    sync(folder)


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
