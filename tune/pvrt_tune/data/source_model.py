"""The model to compress: a folder, a GGUF file or a hub id, read tensor by tensor.

A `Source` holds a skeleton: the model without weights, its parameters on the meta device. Weights
come from memory-mapped safetensors when they are asked for, renamed and converted by transformers'
own loading code, so that a model never has to fit in memory. Only a GGUF file is dequantised whole
(in the model's 16-bit type, in host memory) when it is opened.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GgufConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from pvrt.errors import SourceError
from pvrt.format.aqlm import INDEX_FILE, WEIGHTS_FILE, read_config, weight_files
from pvrt.format.config_block import CONFIG_FILE
from pvrt.format.folder import is_finite
from pvrt.hf.declared import check_counts, read_tokenizer
from pvrt.hf.model_class import auto_class
from pvrt.hf.progress_bars import no_progress_bar
from pvrt.modules.conv1d import conv1d_weights, straighten
from pvrt.modules.experts import ExpertList, unfuse, without_fusing
from pvrt_tune.data import gguf_file
from pvrt_tune.data.fused_experts import taken_apart
from pvrt_tune.data.locate import locate, reader_of
from pvrt_tune.data.sentences import one_sentence
from pvrt_tune.data.stored_weights import (
    Assigned,
    StoredWeights,
    assign,
    digest_of,
    embeddings_first,
    untied,
)
from pvrt_tune.data.transposed import turned

_MOST_LAYERS = 10_000  # of a model of which there is nothing but config.json
_FURTHER = re.compile("nextn|mtp")  # in names of settings: layers that predict further tokens


@dataclass(frozen=True)
class Source:
    """A dense causal language model that is read when asked.

    model: the skeleton, parameters on the meta device (in the model's own floating type) and
    non-persistent buffers real. files: what the digest covers. notes: a line for each thing that
    the user should know of what was opened. transposed: weights that files hold transposed.
    """

    name: str
    model: Any
    tokenizer: Any
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    _stored: StoredWeights = field(repr=False)
    _transforms: list[Any] = field(repr=False)
    _assigned: Assigned = field(repr=False)
    transposed: frozenset[str] = frozenset()

    @cached_property
    def digest(self) -> str:
        """Of config.json and all weight files, or of the .gguf file."""
        return digest_of(self.files)

    @cached_property
    def _made_of(self) -> dict[str, list[str]]:
        """Tensors of the model by the key of files that they are made of; most keys have one."""
        made: dict[str, list[str]] = {}
        for name, keys in self._assigned.keys.items():
            for key in keys:
                made.setdefault(key, []).append(name)
        return made

    def read(self, names: Iterable[str], device: str = "cpu") -> dict[str, Tensor]:
        """Tensors by their name in the model, in the model's own floating type.

        Raises SourceError for a tensor that cannot be read, has another shape than the model's or
        holds values that are not finite.
        """
        names = list(names)
        keys = {key for name in names for key in self._assigned.keys[name]}
        dtype = self.model.dtype
        config = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            device_map={"": device},
            weight_mapping=self._transforms,
        )
        made = {name for key in keys for name in self._made_of[key]}
        before = {name: _get(self.model, name) for name in made}
        try:
            with one_sentence(f"{names[0]} from {self.name}"), no_progress_bar():
                convert_and_load_state_dict_in_model(
                    self.model, {key: self._stored.weights[key] for key in keys}, config, None
                )
            found = {name: _get(self.model, name) for name in names}
        finally:
            for name, tensor in before.items():
                _set(self.model, name, tensor)
        for name, tensor in found.items():
            if tensor.is_meta:
                shapes = {key: self._stored.shape(key) for key in self._assigned.keys[name]}
                raise SourceError(
                    f"{self.name} holds {shapes}, from which {name} of shape {list(tensor.shape)} "
                    "cannot be made; its config.json and weights belong to different models"
                )
            if not is_finite(tensor):
                raise self._stored.not_finite(self._assigned.keys[name], tensor.dtype)
        return {name: tensor.detach() for name, tensor in found.items()}

    def published(self, name: str) -> str:
        """A tensor's or module's name in files, which for some models is not the module's own."""
        stem, _, leaf = name.rpartition(".")
        if name in self._assigned.renamed:
            return self._assigned.renamed[name]
        for weight, rest in ((f"{stem}.weight", f".{leaf}"), (f"{name}.weight", "")):
            if weight in self._assigned.renamed:
                return self._assigned.renamed[weight].removesuffix(".weight") + rest
        return name

    def outside(self, prefix: str) -> list[str]:
        """Names of all stored tensors outside one submodule; a tied tensor counts once."""
        return [name for name in self._assigned.keys if not name.startswith(f"{prefix}.")]

    def inside(self, name: str) -> list[str]:
        """Names of all stored tensors of one submodule."""
        return [key for key in self._assigned.keys if key.startswith(f"{name}.")]

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
        model = self.partial(self._assigned.keys, device)
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
    """The model of `load_source` without its tokenizer and weights, which are only checked by their
    headers; the model of config.json alone where no weights are here."""
    path = locate(name, weights=False)
    if not path.is_dir():
        return _gguf_skeleton(path)[0]
    if any((path / file).exists() for file in (WEIGHTS_FILE, INDEX_FILE)):
        return _opened(name, path).model
    check_counts(read_config(path), _MOST_LAYERS, path / CONFIG_FILE)
    with one_sentence(path):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return _skeleton(config, _dtype(config) or torch.bfloat16, path)[0]


def _open_folder(name: str, folder: Path) -> Source:
    opened = _opened(name, folder)
    with one_sentence(folder):
        tokenizer = read_tokenizer(folder if Path(name).expanduser().is_dir() else name)
        if (folder / "generation_config.json").is_file():
            opened.model.generation_config = GenerationConfig.from_pretrained(folder)
    return replace(opened, tokenizer=tokenizer)


def _opened(name: str, folder: Path) -> Source:
    """A folder without its tokenizer: all that headers say is checked."""
    files = weight_files(folder)  # names a truncated file before anything is loaded
    said = read_config(folder)
    quantization = said.get("quantization_config")
    notes = []
    with one_sentence(folder):
        stored = StoredWeights.open(files)
        check_counts(said, len(stored.weights), folder / CONFIG_FILE)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if quantization:
            reader = reader_of(quantization)
            assert reader is not None  # or there would be no place for it
            stored = reader.dequantised(stored, quantization)
            del config.quantization_config
            kind = reader.NAME
            notes.append(f"{name} is published in {kind}: its weights are dequantised to bfloat16")
    dtype = _dtype(config) or stored.first_float()
    model, transforms = _skeleton(config, dtype, folder)
    stored, transforms = taken_apart(model, stored, transforms)
    transposed = conv1d_weights(model)
    stored = turned(model, stored, transforms, transposed)
    if untied(model, stored, transforms):
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        model, _ = _skeleton(config, dtype, folder)
        notes.append(f"{name} holds an output head of its own, though its config ties it: kept")
        for target in untied(model, stored, transforms):
            raise SourceError(f"{name} holds another {target} than its model ties it to")
    stored = embeddings_first(model, stored, transforms)
    assigned = assign(model, stored, transforms, name)
    notes += _left_out(name, model, assigned.left_out)
    read = (folder / CONFIG_FILE, *files)
    lines = tuple(notes)
    return Source(name, model, None, read, lines, stored, transforms, assigned, transposed)


def _open_gguf(name: str, file: Path) -> Source:
    model, left_out = _gguf_skeleton(file)
    with one_sentence(file), no_progress_bar(), gguf_file.parsed_once():
        where = {"gguf_file": file.name, "local_files_only": True}
        tokenizer = read_tokenizer(file.parent, **where)
        gguf_file.begin_as_stated(tokenizer, file)
        loaded, found = AutoModelForCausalLM.from_pretrained(
            file.parent,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            trust_remote_code=False,
            **where,
        )
        for missing in found["missing_keys"]:
            raise SourceError(f"{file} holds nothing that transformers reads as {missing}")
        model.generation_config = loaded.generation_config
    weights = loaded.state_dict()
    stored, transposed = StoredWeights(weights, dict.fromkeys(weights, file)), conv1d_weights(model)
    stored = turned(model, stored, [], transposed)
    assigned = assign(model, stored, [], name)
    notes = tuple(_left_out(name, model, left_out))
    return Source(name, model, tokenizer, (file,), notes, stored, [], assigned, transposed)


def _gguf_skeleton(file: Path) -> tuple[Any, tuple[str, ...]]:
    """The model of a GGUF file without weights, and the names of tensors that it has no place for.

    Made once, for a plan asks before the run. Raises SourceError for a file that lacks some, and
    for experts, which are stored fused.
    """
    model, left_out = _make_gguf_skeleton(file, file.stat().st_mtime_ns)
    return deepcopy(model), left_out


@lru_cache(maxsize=1)
def _make_gguf_skeleton(file: Path, changed: int) -> tuple[Any, tuple[str, ...]]:
    with one_sentence(file), gguf_file.parsed_once():
        config = AutoConfig.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # of the GGUF that it no longer is
        model, _ = _skeleton(config, torch.bfloat16, file)
        if any(isinstance(module, ExpertList) for module in model.modules()):
            raise SourceError(f"{file} has fused experts; give the original model, in safetensors")
        return model, gguf_file.left_out(file, model)


def _left_out(name: str, model: Any, keys: Sequence[str]) -> list[str]:
    """The line about tensors that a model has no place for, of which its config then says nothing:
    layers that predict further tokens.
    """
    if not keys:
        return []
    for config in (model.config, model.config.get_text_config()):
        for key, value in vars(config).items():
            if _FURTHER.search(key) and isinstance(value, int) and value:
                setattr(config, key, type(value)(0))
    more = f" to {max(keys)}" if len(keys) > 1 else ""
    return [
        f"{name} holds {len(keys)} tensors that {type(model).__name__} has no place for; they are "
        f"left out: {min(keys)}{more}"
    ]


def _skeleton(config: Any, dtype: torch.dtype, where: Path) -> tuple[Any, list[Any]]:
    """A model without weights, its experts one by one, and how weights of files become its."""
    config._attn_implementation = None  # of the machine that wrote it
    with one_sentence(where):
        with init_empty_weights(include_buffers=False):
            auto = auto_class(config)
            model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
        transforms = get_model_conversion_mapping(model)
        if unfuse(model, transforms):
            transforms = without_fusing(transforms)
        straighten(model)
    return model.eval().requires_grad_(False), transforms


def _dtype(config: Any) -> torch.dtype | None:
    """The floating type that a config names."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _get(model: nn.Module, name: str) -> Any:
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), leaf)


def _set(model: nn.Module, name: str, tensor: Any) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, tensor)
