"""What a long script needs, asked before it starts: `check` ends it with a sentence per problem."""

import importlib.util
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path


def check(script: str, problems: Iterable[str | None]) -> None:
    """Print every problem and exit with 2 if there is one."""
    found = [problem for problem in problems if problem is not None]
    for problem in found:
        print(f"{script}: {problem}", file=sys.stderr)
    if found:
        sys.exit(2)


def package(name: str, remedy: str) -> str | None:
    """That a package is installed."""
    if importlib.util.find_spec(name) is not None:
        return None
    return f"the package {name} is not installed; {remedy}"


def free_port(port: int) -> str | None:
    """That nothing listens on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return f"port {port} cannot be used ({error.strerror}); give another with --port"
    return None


def writable(folder: Path) -> str | None:
    """That a folder can be made and written to; nothing is left behind."""
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{folder} cannot be written ({place}: {error.strerror}); give another with --out"


def room(folder: Path, wanted: int) -> str | None:
    """That a folder's disk has so many bytes free."""
    free = shutil.disk_usage(_existing(folder)).free
    if free >= wanted:
        return None
    return f"{folder} needs {wanted / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())
