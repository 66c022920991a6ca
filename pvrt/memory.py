"""How much memory of this machine is free."""

from pathlib import Path

import psutil  # type: ignore[import-untyped]


def free_host_bytes() -> int:
    """Free bytes of host memory; a container's memory limit counts where it is lower.

    Pages of files that a container has read count as used there, and are given up when asked for.
    """
    free: int = psutil.virtual_memory().available
    limit, used = (_number(_cgroup(name)) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        pairs = (line.split() for line in _cgroup("memory.stat").splitlines())
        files = sum(int(n) for name, n in pairs if name in ("active_file", "inactive_file"))
        free = min(free, max(limit - used + files, 0))
    return free


def _cgroup(name: str) -> str:
    """What the container's memory controller says; nothing where there is none."""
    try:
        return Path("/sys/fs/cgroup", name).read_text()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    """A number, where the text is one: a limit may be "max"."""
    return int(text) if text.strip().isdigit() else None
