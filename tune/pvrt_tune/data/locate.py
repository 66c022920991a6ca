"""Where a model lies: a folder, a GGUF file, or files of a hub id, which are downloaded."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError
from transformers.utils import cached_file

from pvrt.errors import CheckpointError, SourceError
from pvrt.format.aqlm import INDEX_FILE, WEIGHTS_FILE, read_config
from pvrt.format.config_block import CONFIG_FILE
from pvrt_tune.data import fp8, gguf_file, mxfp4

FAILURES = (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, SafetensorError)


def reader_of(quantization: Mapping[str, Any]) -> ModuleType | None:
    """What dequantises an original with this `quantization_config` in config.json, if anything."""
    return next((reader for reader in (fp8, mxfp4) if reader.reads(quantization)), None)


def locate(name: str, *, weights: bool = True) -> Path:
    """The folder or .gguf file of a model; of a hub id, what is missing here is downloaded
    (without weights: config.json only).

    Raises SourceError when there is none, or when it is already quantised.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        return gguf_file.checked(path)
    if path.is_dir():
        gguf = sorted(path.glob("*.gguf"))
        if not (path / CONFIG_FILE).exists() and len(gguf) == 1:
            return gguf_file.checked(gguf[0])
    elif path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise SourceError(f"{name} does not exist; give a model folder, a .gguf file or a hub id")
    else:
        path = _download(name, weights)
    if (path / "adapter_config.json").is_file() and not (path / CONFIG_FILE).exists():
        raise SourceError(
            f"{path} is an adapter; merge it into its base model (merge_and_unload of peft) first"
        )
    if any(path.glob("pytorch_model*.bin")) and not any(path.glob("*.safetensors")):
        raise SourceError(
            f"{path} has its weights in pytorch_model.bin, which can hold code; save them as "
            "safetensors (save_pretrained of transformers)"
        )
    quantization = read_config(path).get("quantization_config")
    if quantization and reader_of(quantization) is None:
        method = quantization.get("quant_method", "unknown")
        raise SourceError(f"{path} is already quantised ({method}); give the original, dense model")
    return path


def _download(name: str, weights: bool) -> Path:
    """The snapshot folder of a hub id."""
    with one_sentence(name):
        folder = Path(cached_file(name, CONFIG_FILE)).parent
        if weights:
            optional = {"_raise_exceptions_for_missing_entries": False}
            if cached_file(name, WEIGHTS_FILE, **optional) is None:
                index = json.loads(Path(cached_file(name, INDEX_FILE)).read_text("utf-8"))
                for file in sorted(set(index["weight_map"].values())):
                    cached_file(name, file)
            cached_file(name, "generation_config.json", **optional)
    return folder


@contextmanager
def one_sentence(where: str | Path) -> Iterator[None]:
    """transformers' many failures become one sentence with its own reason."""
    try:
        yield
    except (SourceError, CheckpointError):
        raise
    except FAILURES as error:
        raise SourceError(f"cannot load {where}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What an error of a library says in its first line."""
    if "trust_remote_code" in str(error):
        return "it needs Python code of its own, and pvrt runs none that comes with a model"
    return str(error).strip().split("\n")[0] or type(error).__name__
