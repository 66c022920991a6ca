"""One process at a time works on a run: a lock that the system takes back from the dead."""

import fcntl
import os
import socket
from io import TextIOWrapper
from pathlib import Path

from pvrt.errors import RunError

LOCK_FILE = "lock"
_held: dict[Path, TextIOWrapper] = {}  # locks are this process's, and open files keep them


def hold(folder: Path) -> None:
    """Lock a run's folder, which is made, until this process ends.

    Raises RunError where another process works on it, or the disk refuses.
    """
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _held.get(folder)
        if file is None or not _same(file, folder / LOCK_FILE):
            file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _held[folder] = file
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except (BlockingIOError, PermissionError) as error:
        file = (folder / LOCK_FILE).open(encoding="utf-8")
        with file:
            raise RunError(
                f"{folder.parent} is at work already ({file.read()}); wait for it, stop it, or "
                "give another output folder"
            ) from error
    except OSError as error:
        raise RunError(
            f"cannot write to {folder.parent} ({error}); give another output folder"
        ) from error


def _same(file: TextIOWrapper, path: Path) -> bool:
    """Whether an open file is still the one of a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
