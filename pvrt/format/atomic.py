"""Writing files so that they are on the disk when a call returns."""

import json
import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any


def as_json(value: Any) -> bytes:
    """A JSON file's content."""
    return (json.dumps(value, indent=1) + "\n").encode()


def try_writing(folder: Path) -> None:
    """Raise OSError where a folder cannot be made or written to; makes and leaves nothing.

    For the start of long work whose result goes there.
    """
    folder = folder.absolute()
    place = next(place for place in (folder, *folder.parents) if place.exists())
    with TemporaryFile(dir=place):
        pass


def write_synced(file: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    file.write_bytes(content)
    sync(file)


def replace(file: Path, content: bytes) -> None:
    """Write a file so that readers see what was there before, or all of the new content."""
    temporary = file.with_name(f".{file.name}.partial")
    try:
        write_synced(temporary, content)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    sync(file.parent)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
