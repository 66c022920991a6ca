"""What config.json says a model is, against what its files hold: checked before a weight is read.

Nobody vouches for a folder. No code that comes with one runs, and whatever its files make
transformers raise becomes one sentence that names them.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from pvrt.errors import CheckpointError, PvrtError
from pvrt.format.config_block import CONFIG_FILE
from pvrt.format.folder import StoredModel, is_finite, read_json_object
from pvrt.hf.model_class import auto_class

_Made = TypeVar("_Made")
_FLOATS = ("F16", "BF16", "F32", "F64")
_FLAGS = {"output_attentions", "output_hidden_states", "return_dict", "use_cache"}
# Settings that transformers makes as many modules for, or list entries, as they say.
_COUNTS = re.compile(r"(num_.*_|n_)?layers?")


def read_with(where: Path, read: Callable[..., _Made], *arguments: Any, **options: Any) -> _Made:
    """What a function of transformers makes of files, none of whose code it runs.

    Raises CheckpointError naming `where` for whatever these files make it raise.
    """
    try:
        return read(*arguments, trust_remote_code=False, **options)
    except (PvrtError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # any file may hold anything, and readers check little
        raise CheckpointError(f"{where} cannot be used ({reason(error)})") from error


def reason(error: Exception) -> str:
    """What an error says in its first line (two, if that one ends in a colon), after its kind."""
    if "trust_remote_code" in str(error):
        return "it needs Python code of its own, and pvrt runs none that comes with a model"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {said[:300]}"


def read_config_of(stored: StoredModel) -> Any:
    """The transformers config of a model folder. Raises CheckpointError."""
    from transformers import AutoConfig

    file = stored.path / CONFIG_FILE
    check_counts(stored.config, len(stored.tensors), file)
    for name in _FLAGS & stored.config.keys():  # transformers meets them in the middle of a pass
        if not isinstance(stored.config[name], bool | None):
            raise CheckpointError(f"{file}: {name} must be true or false")
    if (generation := stored.path / "generation_config.json").exists():
        read_json_object(generation)  # transformers goes on without one that it cannot read
    return read_with(file, AutoConfig.from_pretrained, stored.path)


def read_tokenizer(where: str | Path, **options: Any) -> Any:
    """The tokenizer of a model folder (or hub id), tried out: some mistakes only show in use.

    options are those of `AutoTokenizer.from_pretrained`. Raises CheckpointError naming `where`.
    """
    from transformers import AutoTokenizer

    def read(**options: Any) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        tokenizer.decode(tokenizer("a b").input_ids, skip_special_tokens=True)
        return tokenizer

    return read_with(Path(where), read, **options)


def check_counts(config: dict[str, Any], most: int, file: Path) -> None:
    """Check that a config.json says no more layers than its model can have, `most` of them.

    Raises CheckpointError: transformers would make them without end.
    """
    for name, count in _counts(config):
        if count > most:
            raise CheckpointError(f"{file}: {name} is {count}; there are at most {most}")


def _counts(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif isinstance(value, int) and _COUNTS.fullmatch(name):
            yield name, value


def check_tensors(stored: StoredModel, config: Any) -> dict[str, torch.Size]:
    """Check every tensor's shape and type against the model of a transformers config.

    Returns the shapes of that model's parameters. What transformers renames as it loads is not
    compared here, but by its new name with these, once it is loaded. No model is known, and
    nothing is checked, where layers are quantised in a way that is not ours, or where transformers
    has no causal language model of the kind. Raises CheckpointError naming file and tensor.
    """
    from transformers.pytorch_utils import Conv1D

    auto = auto_class(config)
    foreign = not stored.layers and stored.config.get("quantization_config")
    if foreign or type(config) not in auto._model_mapping:
        return {}
    file = stored.path / CONFIG_FILE
    with torch.device("meta"):
        model = read_with(file, auto.from_config, config)
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    turned = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Conv1D)}
    found = dict(_stored_shapes(stored))
    known = {name: _name_in(model, shapes, name) for name in found}
    for name, (part, shape) in found.items():
        if part != name and known[name] in turned:  # a layer in codes is [out, in]
            shape = shape[::-1]
        if (parameter := known[name]) is not None and shapes[parameter] != shape:
            raise CheckpointError(
                f"{stored.tensors[part].file}: {part} makes a {_by(shape)} tensor, config.json "
                f"describes {_by(shapes[parameter])}"
            )
    buffers = {name for name, _ in model.named_buffers()}
    if all(parameter or name in buffers for name, parameter in known.items()):
        missing = shapes.keys() - set(known.values()) - model.all_tied_weights_keys.keys()
        if missing:
            raise CheckpointError(
                f"{stored.path}: {len(missing)} tensors are missing, first {min(missing)}"
            )
    return shapes


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _stored_shapes(stored: StoredModel) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Of every parameter: its name, a tensor that stands for it, and its shape."""
    parts = {f"{name}.{part}" for name in stored.layers for part in stored.PARTS}
    for name, layer in stored.layers.items():
        yield (
            f"{name}.weight",
            (f"{name}.{stored.PARTS[0]}", (layer.out_features, layer.in_features)),
        )
    for name, info in stored.tensors.items():
        if name in parts:
            continue
        if info.dtype not in _FLOATS and name.endswith((".weight", ".bias")):
            raise CheckpointError(f"{info.file}: {name} is {info.dtype}, not a float type")
        yield name, (name, info.shape)


def _name_in(model: nn.Module, shapes: dict[str, torch.Size], name: str) -> str | None:
    """A parameter's name in a model, whose base-model prefix may be there or not."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = (name, name.removeprefix(prefix), f"{prefix}{name}")
    return next((known for known in names if known in shapes), None)


def check_loaded(model: nn.Module, shapes: dict[str, torch.Size], where: Path) -> None:
    """Check a loaded model's parameters: their shapes, and that all are finite.

    shapes as of `check_tensors`; names that it lacks are not compared. Raises CheckpointError.
    """
    for name, parameter in model.named_parameters():
        if shapes.get(name, parameter.shape) != parameter.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(parameter.shape)}, {CONFIG_FILE} describes "
                f"{list(shapes[name])}"
            )
        if not parameter.is_meta and not is_finite(parameter):
            raise CheckpointError(f"{where}: {name} holds values that are not finite")
