"""Writing a checkpoint folder: everything or nothing of it appears."""

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pvrt.errors import CheckpointError
from pvrt.format.aqlm import INDEX_FILE, WEIGHTS_FILE
from pvrt.format.atomic import as_json, replace, sync, write_synced
from pvrt.format.config_block import CONFIG_FILE
from pvrt.format.folder import MANIFEST_FILE, read_json_object, tensor_sha256

FORMAT_VERSION = 1


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
            (staging / name).parent.mkdir(exist_ok=True)
            write_synced(staging / name, content)
        _commit(staging, folder)
    except (OSError, SafetensorError) as error:
        raise _refused(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def add_to_manifest(folder: Path, **entries: Any) -> None:
    """Add to what pvrt.json of a written checkpoint says. Raises CheckpointError as above."""
    file = folder / MANIFEST_FILE
    try:
        replace(file, as_json({**read_json_object(file), **entries}))
    except OSError as error:
        raise _refused(folder, error) from error


def _refused(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot write the checkpoint to {folder} ({error}); free some space and run the same "
        "command again"
    )


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
    files = (file for file in staging.rglob("*") if file.is_file())
    for file in sorted(files, key=lambda file: file.name == CONFIG_FILE):
        place = folder / file.relative_to(staging)
        place.parent.mkdir(exist_ok=True)
        os.replace(file, place)
    sync(folder)
