"""The journal of a run: a line of JSON for every event, with a checksum."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KEYS = ("event", "name", "sha256", "parts", "report", "versions")  # of an event


def line_of(event: Mapping[str, Any]) -> str:
    """An event as a line of the journal."""
    return json.dumps({**event, "check": _check(event)}) + "\n"


def read_journal(file: Path, *, repair: bool) -> list[dict[str, Any]]:
    """Events up to the first line that a kill cut short or that is not as it was written.

    `repair` removes the rest: what it noted is made again.
    """
    events: list[dict[str, Any]] = []
    if not file.is_file():
        return events
    sound, sealed = 0, False  # the first lines of older runs have no checksums
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not _is_event(event) or not line.endswith(b"\n"):
            break
        check = event.pop("check", None)
        sealed = sealed or check is not None
        if sealed and check != _check(event):
            break
        events.append({key: event[key] for key in event if key in _KEYS})
        sound += len(line)
    if repair and sound < file.stat().st_size:  # a new line must not be glued to half a one
        with file.open("r+b") as handle:
            handle.truncate(sound)
    return events


def _is_event(event: Any) -> bool:
    """Whether a line of the journal is what some version of this file writes."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return False
    if event["event"] == "versions":
        return are_texts(event.get("versions"))
    if event["event"] != "piece":
        return True
    parts = event.get("parts", ())
    return (
        isinstance(parts, list | tuple)
        and all(isinstance(each, str) for each in (event.get("name"), event.get("sha256"), *parts))
        and isinstance(event.get("report"), dict)
    )


def are_texts(value: Any) -> bool:
    """Whether something is a mapping of texts, as versions are."""
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def _check(event: Mapping[str, Any]) -> str:
    """The checksum of a line of the journal."""
    return hashlib.sha256(json.dumps(event).encode()).hexdigest()[:16]
