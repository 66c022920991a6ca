"""A tuning run on disk: what was finished, and whether a resumed run is the same run.

    OUT/.run/fingerprint.json   model, data, recipe and versions; resume refuses anything else
    OUT/.run/journal.jsonl      one line per finished block, with the SHA-256 of its file
    OUT/.run/blocks/00007.safetensors

Files are written to a temporary name, synced and renamed; a block counts only when the journal
names it and its file has the journal's hash. A kill at any moment costs the block at work.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pvrt.checkpoint import as_json, write_synced
from pvrt.errors import RunError

RUN_FOLDER = ".run"


class RunState:
    """The journal of one run folder. Open it with `open_run`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events = _read_journal(folder / "journal.jsonl")

    @property
    def finished(self) -> bool:
        """Whether the checkpoint of this run was written."""
        return any(event["event"] == "checkpoint" for event in self.events)

    def load_block(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and report of a finished block, or None when it is not (soundly) there."""
        event = next(
            (e for e in self.events if e["event"] == "block" and e["index"] == index), None
        )
        file = self._block_file(index)
        if event is None or not file.is_file() or _sha256(file) != event["sha256"]:
            return None
        return load_file(file), event["report"]

    def save_block(self, index: int, tensors: Mapping[str, Tensor], report: dict[str, Any]) -> None:
        """Store a finished block atomically. Raises RunError when the disk refuses."""
        file = self._block_file(index)
        temporary = file.with_suffix(".partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(tensors), temporary, metadata={"format": "pt"})
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, file)
            self._append(
                {"event": "block", "index": index, "sha256": _sha256(file), "report": report}
            )
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise RunError(
                f"cannot save block {index} to {file.parent} ({error}); free some space and run "
                "the same command again: finished blocks are kept"
            ) from error

    def finish(self, report: dict[str, Any]) -> None:
        """Note that the checkpoint is written, and drop the block files that it now contains."""
        self._append({"event": "checkpoint", "report": report})
        shutil.rmtree(self.folder / "blocks", ignore_errors=True)

    def _block_file(self, index: int) -> Path:
        return self.folder / "blocks" / f"{index:05d}.safetensors"

    def _append(self, event: dict[str, Any]) -> None:
        with (self.folder / "journal.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(event) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        self.events.append(event)


def open_run(out: Path, fingerprint: Mapping[str, Any], *, resume: bool, restart: bool) -> RunState:
    """Open or start the run of an output folder.

    An unfinished run with the same fingerprint goes on. `resume` insists that there is one,
    `restart` throws it away. Raises RunError when the folder belongs to something else; the
    message lists what differs.
    """
    folder = out / RUN_FOLDER
    file = folder / "fingerprint.json"
    if restart:
        shutil.rmtree(folder, ignore_errors=True)
    if file.is_file():
        stored = _read_fingerprint(file)
        different = _differences(stored, json.loads(json.dumps(fingerprint)))
        if different:
            raise RunError(
                f"{out} holds another run: {'; '.join(different)}. Give the old settings to "
                "resume it, --restart to discard it, or another output folder"
            )
        return RunState(folder)
    if resume:
        raise RunError(f"{out} holds no run to resume; leave --resume out to start one")
    if out.exists() and not restart and any(out.iterdir()):
        raise RunError(f"{out} is not empty and holds no run of pvrt; give another output folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".partial")
        write_synced(temporary, as_json(fingerprint))
        os.replace(temporary, file)
    except OSError as error:
        raise RunError(f"cannot write to {out} ({error}); give another output folder") from error
    return RunState(folder)


def _read_fingerprint(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file} is damaged ({error}); start again with --restart") from error
    if not isinstance(stored, dict):
        raise RunError(f"{file} is damaged; start again with --restart")
    return stored


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} was {before!r}, now {after!r}")
    return found


def _read_journal(file: Path) -> list[dict[str, Any]]:
    """Events up to the first line that a kill cut short."""
    events: list[dict[str, Any]] = []
    if not file.is_file():
        return events
    sound = 0
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            event = json.loads(line)
        except ValueError:
            break
        if not isinstance(event, dict) or not line.endswith(b"\n"):
            break
        events.append(event)
        sound += len(line)
    if sound < file.stat().st_size:  # a new line must not be glued to half a one
        with file.open("r+b") as handle:
            handle.truncate(sound)
    return events


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
