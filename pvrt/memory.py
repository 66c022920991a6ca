"""How much memory of this machine is free."""

from pathlib import Path

import psutil  # type: ignore[import-untyped]


def free_host_bytes() -> int:
    """Free bytes of host memory; a container's memory limit counts where it is lower."""
    free: int = psutil.virtual_memory().available
    limit, used = (_cgroup(name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, max(limit - used, 0))
    return free


def _cgroup(name: str) -> int | None:
    """A number of the container's memory controller, where there is one that says a number."""
    try:
        return int(Path("/sys/fs/cgroup", name).read_text())
    except (OSError, ValueError):
        return None
