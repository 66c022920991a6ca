"""A process and all that it started, measured as one."""

import psutil  # type: ignore[import-untyped]


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it started."""
    return [process, *process.children(recursive=True)]


def cpu_seconds(process: psutil.Process) -> float:
    """Of all processes of a family, and of those that they waited for."""
    return float(sum(sum(member.cpu_times()[:4]) for member in family(process)))
