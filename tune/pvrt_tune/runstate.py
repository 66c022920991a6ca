"""A tuning run on disk: what was finished, and whether a resumed run is the same run.

    OUT/.run/fingerprint.json   model, data and recipe; resume refuses anything else
    OUT/.run/journal.jsonl      one line per finished piece, with the SHA-256 of its file, per
                                checkpoint written, and per set of versions that took part
    OUT/.run/pieces/block-00007.safetensors

Files are written to a temporary name, synced and renamed; a piece counts only when the journal
names it and its file has the journal's hash. A kill at any moment costs the piece at work.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pvrt.durable import as_json, write_synced
from pvrt.errors import RunError
from pvrt_tune.progress import Report

RUN_FOLDER = ".run"
_JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Piece:
    """A finished part of a run: its tensors, and what was reported about it."""

    tensors: dict[str, Tensor]
    report: dict[str, Any]


class RunState:
    """The journal of one run folder. Open it with `open_run`.

    With `writes=False` (all ranks of a sharded run but the first) nothing is saved.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self.events = _read_journal(folder / _JOURNAL)

    @property
    def finished(self) -> bool:
        """Whether the checkpoint of this run was written."""
        return any(event["event"] == "checkpoint" for event in self.events)

    @property
    def calibrated(self) -> bool:
        """Whether this run wrote the checkpoint that PV-Tuning starts from."""
        return any(event["event"] == "calibrated" for event in self.events)

    @property
    def versions(self) -> list[dict[str, str]]:
        """Versions of pvrt and torch that took part, in this order."""
        return [event["versions"] for event in self.events if event["event"] == "versions"]

    def load(self, name: str) -> Piece | None:
        """A finished piece, or None when it is not (soundly) there."""
        report = self.report(name)
        return None if report is None else Piece(load_file(self._file(name)), report)

    def report(self, name: str) -> dict[str, Any] | None:
        """What was reported of a finished piece, or None when it is not (soundly) there."""
        events = [e for e in self.events if e["event"] == "piece" and e["name"] == name]
        file = self._file(name)
        if not events or not file.is_file() or _sha256(file) != events[-1]["sha256"]:
            return None
        report: dict[str, Any] = events[-1]["report"]
        return report

    def save(self, name: str, tensors: Mapping[str, Tensor], report: dict[str, Any]) -> None:
        """Store a finished piece atomically. Raises RunError when the disk refuses."""
        if not self.writes:
            return
        file = self._file(name)
        temporary = file.with_suffix(".partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(tensors), temporary, metadata={"format": "pt"})
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, file)
            self._append(
                {"event": "piece", "name": name, "sha256": _sha256(file), "report": report}
            )
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise RunError(
                f"cannot save {name} to {file.parent} ({error}); free some space and run the same "
                "command again: what is finished is kept"
            ) from error

    def names(self, prefix: str) -> list[str]:
        """Pieces that were saved and not discarded, by name."""
        saved = {e["name"] for e in self.events if e["event"] == "piece"}
        return sorted(n for n in saved if n.startswith(prefix) and self._file(n).is_file())

    def keep_last(self, prefix: str) -> None:
        """Drop all pieces of a prefix but the last by name, which replaces them."""
        for name in self.names(prefix)[:-1] if self.writes else ():
            self._file(name).unlink(missing_ok=True)

    def note_calibrated(self) -> None:
        """Note that the checkpoint that PV-Tuning starts from is written."""
        self._append({"event": "calibrated"})

    def note_versions(self, versions: Mapping[str, str]) -> None:
        """Note with which versions the run goes on, if they are not those of before."""
        if self.versions[-1:] != [versions]:
            self._append({"event": "versions", "versions": dict(versions)})

    def finish(self, report: dict[str, Any]) -> None:
        """Note that the checkpoint is written, and drop the pieces that it now contains."""
        self._append({"event": "checkpoint", "report": report})
        shutil.rmtree(self.folder / "pieces", ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.folder / "pieces" / f"{name}.safetensors"

    def _append(self, event: dict[str, Any]) -> None:
        with (self.folder / _JOURNAL).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(event) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        self.events.append(event)


def has_piece(out: Path, name: str) -> bool:
    """Whether an output folder's run holds a piece, sound or not; its run is not opened."""
    return (out / RUN_FOLDER / "pieces" / f"{name}.safetensors").is_file()


def open_run(
    out: Path,
    fingerprint: Mapping[str, Any],
    versions: Mapping[str, str],
    report: Report,
    *,
    resume: bool,
    restart: bool,
) -> RunState:
    """Open or start the run of an output folder.

    An unfinished run with the same fingerprint goes on; `report` gets a warning when its versions
    were others. `resume` insists that there is a run, `restart` throws it away; its checkpoint
    stays until the new run writes one. Raises RunError when the folder belongs to something else;
    the message lists what differs.
    """
    folder = out / RUN_FOLDER
    file = folder / "fingerprint.json"
    ours = folder.is_dir()
    if out.is_file():
        raise RunError(f"{out} is a file; give a folder for the checkpoint")
    if restart and ours:
        try:
            _discard(folder)
        except OSError as error:
            raise RunError(f"cannot discard the run in {out}: {error}") from error
    if file.is_file():
        stored = _read_fingerprint(file)
        # Runs begun before the journal knew versions have the first ones here.
        first = stored.pop("versions", None)
        different = _differences(stored, json.loads(json.dumps(fingerprint)))
        if different:
            raise RunError(
                f"{out} holds another run: {'; '.join(different)}. Give the old settings to "
                "resume it, --restart to discard it, or another output folder"
            )
        return _go_on(RunState(folder), first, versions, report)
    if resume:
        raise RunError(f"{out} holds no run to resume; leave --resume out to start one")
    if not ours and out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty and holds no run of pvrt; give another output folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".partial")
        write_synced(temporary, as_json(fingerprint))
        os.replace(temporary, file)
    except OSError as error:
        raise RunError(f"cannot write to {out} ({error}); give another output folder") from error
    return _go_on(RunState(folder), None, versions, report)


def _discard(folder: Path) -> None:
    """Empty a run folder. A kill on the way leaves one in which a run can start or go on."""
    (folder / _JOURNAL).unlink(missing_ok=True)  # first: no piece counts without it
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _go_on(
    state: RunState, first: Mapping[str, str] | None, versions: Mapping[str, str], report: Report
) -> RunState:
    """The run with its present versions noted; `first` are those that the journal does not know."""
    if state.finished:
        return state
    if first and not state.versions:
        state.note_versions(first)
    for before in state.versions[-1:]:
        for name in sorted(versions):
            if before.get(name) != versions[name]:
                report(
                    f"warning: this run was made with {name} {before.get(name)} so far and goes on "
                    f"with {versions[name]}: its result may differ from that of one version alone"
                )
    state.note_versions(versions)
    return state


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
