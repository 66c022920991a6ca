"""The model to compress: a folder, a GGUF file or a hub id, loaded in its own precision."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from pvrt.checkpoint import read_config, read_headers, tensor_sha256, weight_files
from pvrt.errors import SourceError


@dataclass(frozen=True)
class Source:
    """A dense causal language model on the CPU, its tokenizer, and a digest of its weights."""

    name: str
    model: Any
    tokenizer: Any
    digest: str


def load_source(name: str) -> Source:
    """Load a model from a folder, a .gguf file (or a folder holding one), or a hub id.

    Weights keep their own floating type; GGUF blocks are dequantised and rounded to bfloat16.
    Only safetensors and GGUF are read, and no code from the model's side is ever run.
    Raises SourceError (or CheckpointError for a damaged folder) with one sentence.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        model, tokenizer = _load_gguf(path)
    elif path.is_dir():
        gguf = sorted(path.glob("*.gguf"))
        if not (path / "config.json").exists() and len(gguf) == 1:
            model, tokenizer = _load_gguf(gguf[0])
        else:
            model, tokenizer = _load_folder(path)
    elif path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise SourceError(f"{name} does not exist; give a model folder, a .gguf file or a hub id")
    else:
        model, tokenizer = _load_transformers(name)
    return Source(name, model.eval().requires_grad_(False), tokenizer, _digest(model))


def _load_folder(path: Path) -> tuple[Any, Any]:
    config = read_config(path)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise SourceError(f"{path} is already quantised ({method}); give the original, dense model")
    read_headers(weight_files(path))  # a truncated file is named before anything is loaded
    return _load_transformers(str(path), local_files_only=True)


def _load_gguf(path: Path) -> tuple[Any, Any]:
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
    return _load_transformers(
        str(path.parent),
        local_files_only=True,
        gguf_file=path.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )


def _load_transformers(name: str, **kwargs: Any) -> tuple[Any, Any]:
    """Load through transformers; its many failures become one sentence with its own reason."""
    gguf_file = kwargs.get("gguf_file")
    where = name if gguf_file is None else str(Path(name) / gguf_file)
    kwargs.setdefault("dtype", "auto")
    if gguf_file is None:
        kwargs["use_safetensors"] = True
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, gguf_file=gguf_file, local_files_only=kwargs.get("local_files_only", False)
        )
        model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, SafetensorError) as e:
        reason = str(e).strip().split("\n")[0] or type(e).__name__
        raise SourceError(f"cannot load {where}: {reason}") from e
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # of the GGUF that it no longer is
    return model, tokenizer


def _digest(model: Any) -> str:
    """SHA-256 over names and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor_sha256(tensor)}\n".encode())
    return digest.hexdigest()
