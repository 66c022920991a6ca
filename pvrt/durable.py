"""Writing files so that they are on the disk when a call returns."""

import json
import os
from pathlib import Path
from typing import Any


def as_json(value: Any) -> bytes:
    """A JSON file's content."""
    return (json.dumps(value, indent=1) + "\n").encode()


def write_synced(file: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    file.write_bytes(content)
    sync(file)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
