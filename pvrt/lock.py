"""Whether the installed packages are those of the repository's lock, constraints.txt."""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

LOCK = Path(__file__).resolve().parents[1] / "constraints.txt"


@dataclass(frozen=True)
class Comparison:
    """Locked packages that are installed: how many, and "name found (locked)" where they differ."""

    installed: int
    differing: tuple[str, ...]


def compare(lock: Path = LOCK) -> Comparison | None:
    """This environment against a lock; None where there is none, as in an installed wheel."""
    # A folder of packages may hold somebody else's file of that name.
    if not lock.is_file() or not lock.with_name("pyproject.toml").is_file():
        return None
    installed, differing = 0, []
    for line in lock.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        pin = Requirement(text)
        if pin.marker is not None and not pin.marker.evaluate():
            continue
        try:
            version = metadata.version(pin.name)
        except metadata.PackageNotFoundError:
            continue
        installed += 1
        if not pin.specifier.contains(version, prereleases=True):
            differing.append(f"{pin.name} {version} ({str(pin.specifier).removeprefix('==')})")
    return Comparison(installed, tuple(differing))
