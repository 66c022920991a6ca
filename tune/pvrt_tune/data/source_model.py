"""The model to compress: a folder, a GGUF file or a hub id, read tensor by tensor.

A `Source` holds a skeleton: the model without weights, its parameters on the meta device. Weights
come from memory-mapped safetensors when they are asked for, renamed and converted by transformers'
own loading code, so that a model never has to fit in memory. Only a GGUF file is dequantised whole
(in the model's 16-bit type, in host memory) when it is opened.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import cached_file

from pvrt.errors import CheckpointError, SourceError
from pvrt.format.aqlm import INDEX_FILE, WEIGHTS_FILE, read_config, weight_files
from pvrt.format.config_block import CONFIG_FILE
from pvrt.hf.progress_bars import no_progress_bar
from pvrt.modules.experts import ExpertList, unfuse, without_fusing
from pvrt_tune.data.bos import begin_as_stated

_FAILURES = (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, SafetensorError)


@dataclass(frozen=True)
class Source:
    """A dense causal language model that is read when asked.

    model: the skeleton, parameters on the meta device (in the model's own floating type) and
    non-persistent buffers real. files: what the digest covers.
    """

    name: str
    model: Any
    tokenizer: Any
    files: tuple[Path, ...]
    _weights: Mapping[str, Any] = field(repr=False)
    _transforms: list[Any] = field(repr=False)
    _keys: Mapping[str, list[str]] = field(repr=False)
    _renamed: Mapping[str, str] = field(repr=False)

    @cached_property
    def digest(self) -> str:
        """Of config.json and all weight files, or of the .gguf file."""
        return digest_of(self.files)

    def read(self, names: Iterable[str], device: str = "cpu") -> dict[str, Tensor]:
        """Tensors by their name in the model, in the model's own floating type.

        Raises SourceError for a tensor that cannot be read or has another shape than the model's.
        """
        names = list(names)
        keys = {key for name in names for key in self._keys[name]}
        dtype = self.model.dtype
        config = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            device_map={"": device},
            weight_mapping=self._transforms,
        )
        before = {name: _get(self.model, name) for name in names}
        try:
            with no_progress_bar():
                convert_and_load_state_dict_in_model(
                    self.model, {key: self._weights[key] for key in keys}, config, None
                )
            found = {name: _get(self.model, name) for name in names}
        except _FAILURES as error:
            raise SourceError(
                f"cannot read {names[0]} from {self.name}: {_reason(error)}"
            ) from error
        finally:
            for name, tensor in before.items():
                _set(self.model, name, tensor)
        for name, tensor in found.items():
            if tensor.is_meta:
                shapes = {key: list(_shape(self._weights[key])) for key in self._keys[name]}
                raise SourceError(
                    f"{self.name} holds {shapes}, from which {name} of shape {list(tensor.shape)} "
                    "cannot be made; its config.json and weights belong to different models"
                )
        return {name: tensor.detach() for name, tensor in found.items()}

    def published(self, name: str) -> str:
        """A tensor's or module's name in files, which for some models is not the module's own."""
        stem, _, leaf = name.rpartition(".")
        if name in self._renamed:
            return self._renamed[name]
        for weight, rest in ((f"{stem}.weight", f".{leaf}"), (f"{name}.weight", "")):
            if weight in self._renamed:
                return self._renamed[weight].removesuffix(".weight") + rest
        return name

    def outside(self, prefix: str) -> list[str]:
        """Names of all stored tensors outside one submodule; a tied tensor counts once."""
        return [name for name in self._keys if not name.startswith(f"{prefix}.")]

    def inside(self, name: str) -> list[str]:
        """Names of all stored tensors of one submodule."""
        return [key for key in self._keys if key.startswith(f"{name}.")]

    def load(self, name: str, device: str, dtype: torch.dtype) -> nn.Module:
        """A copy of one submodule with weights of its own, free to be changed."""
        module: nn.Module = deepcopy(self.model.get_submodule(name))
        inside = self.inside(name)
        tensors = self.read(inside, device)
        own = {}
        for key in inside:  # a tensor of the source may be a view of its file
            own[key.removeprefix(f"{name}.")] = tensors.pop(key).to(dtype, copy=True)
        fill(module, own, device)
        return module

    def partial(self, names: Iterable[str], device: str) -> Any:
        """A copy of the model with some of its weights (only to be read); the rest stays meta."""
        model = deepcopy(self.model)
        fill(model, self.read(names, device), device)
        return model

    def dense(self, dtype: torch.dtype | None = None, device: str = "cpu") -> Any:
        """The whole model, only to be run, in `dtype` or its own floating type."""
        model = self.partial(self._keys, device)
        model.tie_weights()
        own = model.dtype
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype or own)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                # Rotary tables are float32 in every model; they stay so.
                if buffer.dtype == own and own != torch.float32:
                    setattr(module, name, buffer.to(dtype or own))
        return model


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 of what `sha256sum FILES` prints."""
    lines = ""
    for file in files:
        with file.open("rb") as handle:
            lines += f"{hashlib.file_digest(handle, 'sha256').hexdigest()}  {file.name}\n"
    return hashlib.sha256(lines.encode()).hexdigest()


def fill(module: nn.Module, tensors: Mapping[str, Tensor], device: str) -> None:
    """Put tensors in the place of a module's parameters, and its buffers on the device."""
    module.load_state_dict(tensors, strict=False, assign=True)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def load_source(name: str) -> Source:
    """Open a model: a folder, a .gguf file (or a folder holding one), or a hub id.

    Weights keep the model's own floating type; GGUF blocks are dequantised and rounded to bfloat16.
    Only safetensors and GGUF are read, and no code from the model's side is ever run.
    Raises SourceError (or CheckpointError for a damaged folder) with one sentence.
    """
    path = locate(name)
    return _open_folder(name, path) if path.is_dir() else _open_gguf(name, path)


def load_skeleton(name: str) -> Any:
    """The model without weights, from config.json or a GGUF file's header alone."""
    path = locate(name, weights=False)
    with _one_sentence(path):
        if path.is_dir():
            config = AutoConfig.from_pretrained(path, local_files_only=True)
        else:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    dtype = _dtype(config) if path.is_dir() else None
    return _skeleton(config, dtype or torch.bfloat16, path)[0]


def locate(name: str, *, weights: bool = True) -> Path:
    """The folder or .gguf file of a model; of a hub id, what is missing here is downloaded
    (without weights: config.json only).

    Raises SourceError when there is none, or when it is already quantised.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        return _checked_gguf(path)
    if path.is_dir():
        gguf = sorted(path.glob("*.gguf"))
        if not (path / CONFIG_FILE).exists() and len(gguf) == 1:
            return _checked_gguf(gguf[0])
    elif path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise SourceError(f"{name} does not exist; give a model folder, a .gguf file or a hub id")
    else:
        path = _download(name, weights)
    quantization = read_config(path).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise SourceError(f"{path} is already quantised ({method}); give the original, dense model")
    return path


def _download(name: str, weights: bool) -> Path:
    """The snapshot folder of a hub id."""
    with _one_sentence(name):
        folder = Path(cached_file(name, CONFIG_FILE)).parent
        if weights:
            optional = {"_raise_exceptions_for_missing_entries": False}
            if cached_file(name, WEIGHTS_FILE, **optional) is None:
                index = json.loads(Path(cached_file(name, INDEX_FILE)).read_text("utf-8"))
                for file in sorted(set(index["weight_map"].values())):
                    cached_file(name, file)
            cached_file(name, "generation_config.json", **optional)
    return folder


def _open_folder(name: str, folder: Path) -> Source:
    files = weight_files(folder)  # names a truncated file before anything is loaded
    with _one_sentence(folder):
        tokenizer = AutoTokenizer.from_pretrained(
            folder if Path(name).expanduser().is_dir() else name
        )
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        weights = {}
        for file in files:
            handle: Any = safe_open(file, framework="pt")
            weights.update({key: handle.get_slice(key) for key in handle.keys()})  # noqa: SIM118
        model, transforms = _skeleton(config, _dtype(config) or _first_float(weights), folder)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    keys, renamed = _assign_keys(model, weights, transforms, name)
    read = (folder / CONFIG_FILE, *files)
    return Source(name, model, tokenizer, read, weights, transforms, keys, renamed)


def _open_gguf(name: str, file: Path) -> Source:
    with _one_sentence(file), no_progress_bar():
        where = {"gguf_file": file.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        begin_as_stated(tokenizer, file)
        loaded = AutoModelForCausalLM.from_pretrained(
            file.parent,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            **where,
        )
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # of the GGUF that it no longer is
        model, _ = _skeleton(config, torch.bfloat16, file)
        model.generation_config = loaded.generation_config
    weights = loaded.state_dict()
    if any(isinstance(module, ExpertList) for module in model.modules()):
        raise SourceError(f"{file} has fused experts; give the original model, in safetensors")
    keys, renamed = _assign_keys(model, weights, [], name)
    return Source(name, model, tokenizer, (file,), weights, [], keys, renamed)


def _checked_gguf(path: Path) -> Path:
    if not path.is_file():
        raise SourceError(f"{path} does not exist; give the path of a .gguf file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SourceError(f"{path} is not a GGUF file (its first bytes are not 'GGUF')")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise SourceError(
            "reading GGUF needs the gguf package: pip install 'pvrt[gguf]'"
        ) from error
    return path


def _skeleton(config: Any, dtype: torch.dtype, where: Path) -> tuple[Any, list[Any]]:
    """A model without weights, its experts one by one, and how weights of files become its."""
    with _one_sentence(where):
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        transforms = get_model_conversion_mapping(model)
        if unfuse(model, transforms):
            transforms = without_fusing(transforms)
    return model.eval().requires_grad_(False), transforms


def _dtype(config: Any) -> torch.dtype | None:
    """The floating type that a config names."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _first_float(weights: Mapping[str, Any]) -> torch.dtype:
    types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    found = (types.get(part.get_dtype()) for part in weights.values())
    return next((dtype for dtype in found if dtype is not None), torch.float32)


def _assign_keys(
    model: Any, weights: Mapping[str, Any], transforms: list[Any], name: str
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Which tensors of the files make up each tensor of the model, and which are only renamed.

    Raises SourceError when the files lack one: transformers would make it up.
    """
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    wanted = model.state_dict()
    keys: dict[str, list[str]] = {}
    plain = set()
    for key in weights:
        target, merged = rename_source_key(
            key, renamings, converters, model.base_model_prefix, wanted
        )
        target = target if target in wanted else key
        keys.setdefault(target, []).append(key)
        if merged is None:
            plain.add(target)
    tied = model.all_tied_weights_keys
    optional = model._keys_to_ignore_on_load_missing or []
    for target, tensor in wanted.items():
        if target in tied or (target not in keys and any(re.search(p, target) for p in optional)):
            continue
        if target not in keys:
            raise SourceError(f"{name} holds no weights for {target}, which its config asks for")
        shape = _shape(weights[keys[target][0]])
        if target in plain and shape != tuple(tensor.shape):
            raise SourceError(
                f"{name}: {target} has shape {list(shape)}, its config asks for "
                f"{list(tensor.shape)}"
            )
    stored = {target: keys[target] for target in wanted if target in keys and target not in tied}
    renamed = {
        target: stored[target][0]
        for target in plain & stored.keys()
        if not target.endswith(stored[target][0])  # the base model's prefix is no other name
    }
    return stored, renamed


def _shape(weight: Any) -> tuple[int, ...]:
    return tuple(weight.shape if isinstance(weight, Tensor) else weight.get_shape())


def _get(model: nn.Module, name: str) -> Any:
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), leaf)


def _set(model: nn.Module, name: str, tensor: Any) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, tensor)


@contextmanager
def _one_sentence(where: str | Path) -> Iterator[None]:
    """transformers' many failures become one sentence with its own reason."""
    try:
        yield
    except (SourceError, CheckpointError):
        raise
    except _FAILURES as error:
        raise SourceError(f"cannot load {where}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
