"""A tuning run on disk: what was finished, and whether a resumed run is the same run.

    OUT/.run/fingerprint.json   model, data and recipe; resume refuses anything else
    OUT/.run/journal.jsonl      one line per finished piece, with the SHA-256 of its file, per
                                checkpoint written, and per set of versions that took part; each
                                with a checksum of its own
    OUT/.run/lock               the process at work, which holds a lock on it
    OUT/.run/pieces/block-00007.safetensors

Files are written to a temporary name, synced and renamed; a piece counts only when the journal
names it and its files have the journal's hashes. A kill at any moment costs the piece at work.
A piece may have several parts, which the ranks of a sharded run write at once (shards.py); the
first rank alone writes the journal, when all of them are there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pvrt.errors import RunError
from pvrt.format.atomic import as_json, replace, sync, try_writing
from pvrt_tune.journal import are_texts, line_of, read_journal
from pvrt_tune.lock import LOCK_FILE, hold
from pvrt_tune.progress import Report
from pvrt_tune.settings import TuneJob
from pvrt_tune.settings.files import is_old, renewed

RUN_FOLDER = ".run"
FINGERPRINT_FILE = "fingerprint.json"
_JOURNAL = "journal.jsonl"
_LONGEST, _MOST = 100, 15  # characters of a setting, and settings, that a sentence shows
_STAGES = ("finetune", "training", "pv")  # whose settings a recipe holds


@dataclass(frozen=True)
class Piece:
    """A finished part of a run: its tensors, and what was reported about it."""

    tensors: dict[str, Tensor]
    report: dict[str, Any]


class Store:
    """The journal of one run folder. Open it with `open_store`.

    With `writes=False` (all ranks of a sharded run but the first) the journal and the pieces in it
    stay as they are; `write` still works.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self.events = read_journal(folder / _JOURNAL, repair=writes)

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
        """A finished piece of one part, or None when it is not (soundly) there."""
        report = self.report(name)
        return None if report is None else Piece(load_file(self.file(name)), report)

    def report(self, name: str) -> dict[str, Any] | None:
        """What was reported of a finished piece, or None when it is not (soundly) there."""
        count = self.parts(name)
        sound = count > 0 and all(self.sound(name, part) for part in range(count))
        return self.noted(name) if sound else None

    def noted(self, name: str) -> dict[str, Any]:
        """What was reported of a piece in the journal; its files are not looked at."""
        event = self._event(name)
        if event is None:
            raise KeyError(name)
        report: dict[str, Any] = event["report"]
        return report

    def parts(self, name: str) -> int:
        """Number of files of a piece in the journal; 0 when it is not in there."""
        event = self._event(name)
        return 0 if event is None else len(_hashes(event))

    def sound(self, name: str, part: int) -> bool:
        """Whether a part of a piece in the journal is on the disk as it was written."""
        event, file = self._event(name), self.file(name, part)
        return event is not None and file.is_file() and _sha256(file) == _hashes(event)[part]

    def file(self, name: str, part: int = 0) -> Path:
        """Where a part of a piece is."""
        suffix = f".part{part}" if part else ""
        return self.folder / "pieces" / f"{name}{suffix}.safetensors"

    def save(self, name: str, tensors: Mapping[str, Tensor], report: dict[str, Any]) -> None:
        """Store a finished piece atomically. Raises RunError when the disk refuses."""
        if self.writes:
            self.note(name, [self.write(name, tensors)], report)

    def write(self, name: str, tensors: Mapping[str, Tensor], part: int = 0) -> str:
        """Write a part of a piece, which counts once it is noted. Returns its SHA-256.

        Raises RunError when the disk refuses.
        """
        file = self.file(name, part)
        temporary = file.with_suffix(".partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(tensors), temporary, metadata={"format": "pt"})
            sync(temporary)
            os.replace(temporary, file)
            return _sha256(file)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise _refused(name, file.parent, error) from error

    def note(self, name: str, hashes: Sequence[str], report: dict[str, Any]) -> None:
        """Note a piece whose parts are written; hashes [parts]. Raises RunError like `write`."""
        event: dict[str, Any] = {"event": "piece", "name": name, "sha256": hashes[0]}
        if len(hashes) > 1:
            event["parts"] = list(hashes)
        self._append({**event, "report": report})

    def put(self, name: str, content: bytes) -> None:
        """Keep a file beside the journal, for people. Raises RunError when the disk refuses."""
        try:
            replace(self.folder / name, content)
        except OSError as error:
            raise _refused(name, self.folder, error) from error

    def names(self, prefix: str) -> list[str]:
        """Pieces that were saved and not discarded, by name."""
        saved = {e["name"] for e in self.events if e["event"] == "piece"}
        return sorted(n for n in saved if n.startswith(prefix) and self.file(n).is_file())

    def keep_last(self, prefix: str, count: int = 1) -> None:
        """Drop all pieces of a prefix but the last ones by name, which replace them."""
        names = self.names(prefix)
        for name in names[: max(0, len(names) - count)] if self.writes else ():
            for part in range(self.parts(name)):
                self.file(name, part).unlink(missing_ok=True)

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

    def _event(self, name: str) -> dict[str, Any] | None:
        """The newest of a piece."""
        events = (e for e in reversed(self.events) if e["event"] == "piece" and e["name"] == name)
        return next(events, None)

    def _append(self, event: dict[str, Any]) -> None:
        try:
            if self.writes:
                with (self.folder / _JOURNAL).open("a", encoding="utf-8") as handle:
                    handle.write(line_of(event))
                    handle.flush()
                    os.fsync(handle.fileno())
        except OSError as error:
            raise _refused(event.get("name", _JOURNAL), self.folder, error) from error
        self.events.append(event)


def _hashes(event: Mapping[str, Any]) -> list[str]:
    """SHA-256 of every part of a piece."""
    hashes: list[str] = event.get("parts", [event["sha256"]])
    return hashes


def _refused(name: str, folder: Path, error: Exception) -> RunError:
    return RunError(
        f"cannot save {name} to {folder} ({error}); free some space and run the same command "
        "again: what is finished is kept"
    )


def unseen() -> RunError:
    """The error where one rank cannot read what another keeps in the run folder."""
    return RunError(
        "what another process saved cannot be read here; give an output folder that all processes "
        "see"
    )


def has_piece(out: Path, name: str) -> bool:
    """Whether an output folder's run holds a piece, sound or not; its run is not opened."""
    return (out / RUN_FOLDER / "pieces" / f"{name}.safetensors").is_file()


def choices_of(out: Path) -> dict[str, Any]:
    """What the run in an output folder has chosen, by name; nothing where there is none.

    Raises RunError for a damaged run.
    """
    file = out / RUN_FOLDER / FINGERPRINT_FILE
    recipe = _read_fingerprint(file).get("recipe", {}) if file.is_file() else {}
    parts = (recipe.get(name) or {} for name in _STAGES)
    return {name: value for part in parts for name, value in part.items()}


def check_output(out: Path, *, resume: bool) -> None:
    """Raise RunError where a run's folder cannot be: asked before anything of the model is read.

    Nothing is made and nothing is left behind.
    """
    if out.is_file():
        raise RunError(f"{out} is a file; give a folder for the checkpoint")
    if resume and not (out / RUN_FOLDER / FINGERPRINT_FILE).is_file():
        raise RunError(f"{out} holds no run to resume; leave --resume out to start one")
    try:
        if out.exists() and not (out / RUN_FOLDER).is_dir() and any(out.iterdir()):
            raise RunError(
                f"{out} is not empty and holds no run of pvrt; give another output folder"
            )
        try_writing(out)
    except OSError as error:
        raise RunError(f"cannot write to {out} ({error}); give another output folder") from error


def open_store(
    job: TuneJob, fingerprint: Mapping[str, Any], versions: Mapping[str, str], report: Report
) -> Store:
    """Open or start the run of a job's output folder.

    An unfinished run with the same fingerprint goes on; `report` gets a warning when its versions
    were others. `job.resume` insists that there is a run, `job.restart` throws it away; its
    checkpoint stays until the new run writes one. Raises RunError when the folder belongs to
    something else; the message lists what differs.
    """
    out = job.out
    folder = out / RUN_FOLDER
    file = folder / FINGERPRINT_FILE
    check_output(out, resume=job.resume)
    hold(folder)
    if job.restart:
        try:
            _discard(folder)
        except OSError as error:
            raise RunError(f"cannot discard the run in {out}: {error}") from error
    if file.is_file():
        stored = _read_fingerprint(file)
        # Runs begun before the journal knew versions have the first ones here.
        first = stored.pop("versions", None)
        recipe = stored.get("recipe")
        if isinstance(recipe, dict):
            stored["recipe"] = {"embeddings": "keep", **recipe}  # what runs of version 0.1 did
        different = _differences(stored, json.loads(json.dumps(fingerprint)))
        if different:
            raise RunError(
                f"{out} holds another run: {'; '.join(different)}. Give the old settings to "
                "resume it, --restart to discard it, or another output folder"
            )
        return _go_on(Store(folder), first, versions, report)
    try:
        replace(file, as_json(fingerprint))
    except OSError as error:
        raise RunError(f"cannot write to {out} ({error}); give another output folder") from error
    return _go_on(Store(folder), None, versions, report)


def _discard(folder: Path) -> None:
    """Empty a run folder. A kill on the way leaves one in which a run can start or go on."""
    (folder / _JOURNAL).unlink(missing_ok=True)  # first: no piece counts without it
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def _go_on(
    store: Store, first: Mapping[str, str] | None, versions: Mapping[str, str], report: Report
) -> Store:
    """The run with its present versions noted; `first` are those that the journal does not know."""
    if store.finished:
        return store
    if first and not store.versions:
        store.note_versions(first)
    for before in store.versions[-1:]:
        for name in sorted(versions):
            if before.get(name) != versions[name]:
                report(
                    f"warning: this run was made with {name} {before.get(name)} so far and goes on "
                    f"with {versions[name]}: its result may differ from that of one version alone"
                )
    store.note_versions(versions)
    return store


def _read_fingerprint(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} is damaged ({error}); start again with --restart") from error
    recipe = stored.get("recipe", {}) if isinstance(stored, dict) else None
    if isinstance(recipe, dict) and is_old(recipe):
        recipe = renewed(recipe)
    if recipe is None or not (_are_settings(recipe) and are_texts(stored.get("versions", {}))):
        raise RunError(f"{file} is damaged; start again with --restart")
    if recipe.get("training"):  # what runs did before there was a choice
        recipe["training"] = {"states": "device", "snapshots": True, **recipe["training"]}
    return {**stored, "recipe": recipe} if recipe else stored


def _are_settings(recipe: Any) -> bool:
    """Whether a recipe is a mapping, and so are those of its stages that it has."""
    if not isinstance(recipe, dict):
        return False
    return all(isinstance(recipe.get(name) or {}, dict) for name in _STAGES)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            name = f"{prefix}{key}"[:_LONGEST]
            found.append(f"{name} was {_shown(before)}, now {_shown(after)}")
    return found[:_MOST]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
