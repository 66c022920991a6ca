"""Where a model lies: a folder, a GGUF file, or files of a hub id, which are downloaded."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pvrt.errors import SourceError
from pvrt.format.aqlm import read_config
from pvrt.format.config_block import CONFIG_FILE
from pvrt_tune.data import fp8, gguf_file, mxfp4
from pvrt_tune.data.hub import download, is_path


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
    elif is_path(name):
        raise SourceError(f"{name} does not exist; give a model folder, a .gguf file or a hub id")
    else:
        path = download(name, weights)
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
    described = quantization if isinstance(quantization, dict) else {}
    if quantization and reader_of(described) is None:
        method = described.get("quant_method", "unknown")
        raise SourceError(f"{path} is already quantised ({method}); give the original, dense model")
    return path
