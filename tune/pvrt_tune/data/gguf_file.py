"""What a GGUF file says of itself: whether it is whole, and whether texts begin with a BOS token.

transformers reads neither: it makes up the tensors that a file lacks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pvrt.errors import SourceError
from pvrt.tools.perplexity import beginning
from pvrt.versions import install

_BOS = "tokenizer.ggml.add_bos_token"
_PARTS = "split.count"
_ARCHITECTURE = "general.architecture"
_LAYERS = ".block_count"
_ASKED = (_BOS, _PARTS, _ARCHITECTURE)


def checked(path: Path) -> Path:
    """The path of a whole GGUF file. Raises SourceError for another, and for a part of one."""
    if not path.is_file():
        raise SourceError(f"{path} does not exist; give the path of a .gguf file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SourceError(f"{path} is not a GGUF file (its first bytes are not 'GGUF')")
    parts = _header(path).fields.get(_PARTS)
    if parts is not None and int(parts) > 1:
        raise SourceError(
            f"{path} is one of {int(parts)} parts of a model; join them first "
            "(llama-gguf-split --merge)"
        )
    return path


@contextmanager
def parsed_once() -> Iterator[None]:
    """Within it a file's header is parsed once, and names of tensors are worked out once.

    transformers parses the header for each of config, tokenizer and weights, which takes seconds
    for the vocabulary, and works out all names again for every module of the model.
    """
    import gguf

    with (
        patch.object(gguf, "GGUFReader", lru_cache(maxsize=1)(gguf.GGUFReader)),
        patch.object(gguf, "get_tensor_name_map", lru_cache(maxsize=1)(gguf.get_tensor_name_map)),
    ):
        yield


@dataclass(frozen=True)
class _Header:
    """What is asked of a file: the values of some fields by key, and the names of its tensors."""

    fields: dict[str, Any]
    tensors: frozenset[str]


def _header(path: Path) -> _Header:
    """The header of a file, read again only when the file has changed: a reader takes seconds for
    the vocabulary. Raises SourceError for a damaged file.
    """
    return _read_header(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _read_header(path: Path, changed: int) -> _Header:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise SourceError(f"reading GGUF needs the gguf package: {install('gguf')}") from error
    try:
        reader = GGUFReader(path)
    except Exception as error:  # it trusts every number of the file
        raise SourceError(
            f"{path} is damaged or cut short ({error}); copy or download it again"
        ) from error
    fields = {
        key: field.contents()
        for key, field in reader.fields.items()
        if key in _ASKED or key.endswith(_LAYERS)
    }
    for key, count in fields.items():
        if key.endswith(_LAYERS) and not 0 < int(count) <= len(reader.tensors):
            raise SourceError(
                f"{path}: {key} is {count}, and the file has {len(reader.tensors)} tensors; copy "
                "or download it again"
            )
    return _Header(fields, frozenset(tensor.name for tensor in reader.tensors))


def left_out(file: Path, model: Any) -> tuple[str, ...]:
    """Names of the file's tensors that a model, which may be empty, has no place for.

    Raises SourceError when the file lacks one that the model needs.
    """
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    header = _header(file)
    stored, architecture = header.tensors, header.fields[_ARCHITECTURE]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    for name, target in names.items():
        if name not in stored and target not in model.all_tied_weights_keys:
            raise SourceError(
                f"{file} holds no {name}, which its model needs for {target}; copy or download the "
                "whole file again"
            )
    # Rotary tables, which models compute by themselves.
    return tuple(sorted(name for name in stored - names.keys() if "rope_f" not in name))


def begin_as_stated(tokenizer: Any, file: Path) -> None:
    """Have a tokenizer begin texts with its BOS token, or not, as its GGUF file states.

    Nothing changes where the file does not say. Models that were trained with the token answer
    nonsense without it.
    """
    stated = _header(file).fields.get(_BOS)
    if stated is None or tokenizer.bos_token_id is None:
        return
    stated = bool(stated)
    if stated != (beginning(tokenizer) == [tokenizer.bos_token_id]):
        tokenizer.add_bos_token = stated
