"""Build what is uploaded to a package index: `make release`, or `python dev/release.py`.

It refuses a tree with changes, a version that CHANGELOG.md has no dated section for, and a tag of
that version elsewhere. Then dist/ gets the sdist, and the wheel for this machine that is built from
it. Wheels for all machines come from .github/workflows/wheels.yml, which runs `--check` first.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
#: The oldest C library that wheels run with, as pyproject.toml says of those built elsewhere.
PLATFORM = "manylinux_2_28"


def version() -> str:
    """The version, from the one place where it stands."""
    text = (ROOT / "pvrt" / "version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        sys.exit("pvrt/version.py has no line with __version__")
    return found[1]


def check(number: str, tag: str | None) -> None:
    """End with one sentence where this tree is no release of that version."""
    changed = git("status", "--porcelain")
    if changed:
        sys.exit(f"the tree has changes; commit them first:\n{changed}")
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    pending = re.search(r"^## Unreleased\n(?:(?!## ).*\n)*?- ", log, re.MULTILINE)
    dated = re.search(rf"^## {re.escape(number)} - \d{{4}}-\d\d-\d\d$", log, re.MULTILINE)
    if pending or not dated:
        sys.exit(
            f"CHANGELOG.md has changes under Unreleased, or none of {number}: give them a heading "
            f"like '## {number} - 2026-01-31'"
        )
    if tag not in (None, f"v{number}"):
        sys.exit(f"the tag is {tag} and pvrt/version.py says {number}; change one of them")
    tagged = git("tag", "--list", f"v{number}")
    if tagged and git("rev-parse", f"{tagged}^{{commit}}") != git("rev-parse", "HEAD"):
        sys.exit(f"{tagged} is the tag of another commit; raise the version in pvrt/version.py")


def git(*arguments: str) -> str:
    """What git prints."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def build() -> list[Path]:
    """The sdist, and the wheel that is built from it, tagged for all systems that it runs on."""
    shutil.rmtree(DIST, ignore_errors=True)
    python("build", "--outdir", str(DIST))
    (plain,) = DIST.glob("*.whl")
    machine = plain.stem.rpartition("linux_")[2]
    tagged = ("--plat", f"{PLATFORM}_{machine}", "--only-plat", "--wheel-dir", str(DIST))
    python("auditwheel", "repair", *tagged, str(plain))
    plain.unlink()
    files = sorted(DIST.iterdir())
    python("twine", "check", "--strict", *map(str, files))
    return files


def python(module: str, *arguments: str) -> None:
    """Run a tool of this environment; end where it fails."""
    if subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT).returncode:
        sys.exit(f"{module} failed")


def main() -> None:
    """Check, build, and say what comes next."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="build nothing")
    parser.add_argument("--tag", help="it must be this version's")
    parser.add_argument("--unreleased", action="store_true", help="build without the checks")
    options = parser.parse_args()
    number = version()
    if not options.unreleased:
        check(number, options.tag)
    if options.check:
        print(f"this is {number}")
        return
    for file in build():
        print(f"{file.stat().st_size / 1e6:8.2f} MB  {file.relative_to(ROOT)}")
    print(f"next: git tag v{number} && git push origin v{number}, which builds and uploads all")


if __name__ == "__main__":
    main()
