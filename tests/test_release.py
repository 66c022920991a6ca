"""What is uploaded: the sdist is the repository, the wheel our packages and the C library."""

import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from tests.fixtures.imports import PACKAGES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
needs_git = pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="this is no checkout"
)


def git(folder: Path, *arguments: str) -> str:
    mine = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    done = subprocess.run(
        ["git", *mine, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout


def tracked() -> set[str]:
    """Files of the next commit, new ones included, deleted ones not."""
    listed = git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


def build(kind: str, source: Path, to: Path) -> Path:
    """The sdist or wheel of a tree, by the build backend that pyproject.toml names."""
    script = f"import setuptools.build_meta as b; print(b.build_{kind}({str(to)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return to / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of a clean checkout."""
    place = tmp_path_factory.mktemp("sdist")
    for name in tracked():
        copy = place / "checkout" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    with tarfile.open(build("sdist", place / "checkout", place)) as archive:
        archive.extractall(place, filter="data")
    return next(place.glob("pvrt-*/"))


@needs_git
def test_the_sdist_is_the_repository(sdist: Path) -> None:
    made = {"PKG-INFO", "setup.cfg"}
    names = {str(file.relative_to(sdist)) for file in sdist.rglob("*") if file.is_file()}
    assert {name for name in names if not name.startswith("pvrt.egg-info/")} - made == tracked()


@pytest.mark.slow
@needs_git
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_wheel_of_the_sdist_has_our_packages_and_the_library(
    sdist: Path, tmp_path: Path
) -> None:
    wheel = build("wheel", sdist, tmp_path)
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        library = archive.read("pvrt_kernels/cpu/libpvrt_cpu.so")
    roots = {name: str(root.relative_to(ROOT)) for name, root in PACKAGES.items()}
    ours = {
        f"{name}{file.removeprefix(root)}"
        for file in tracked()
        for name, root in roots.items()
        if file.startswith(f"{root}/") and not file.endswith((".c", ".h"))
    }
    files = {name for name in names if not name.endswith("/")}
    assert files == ours | {"pvrt_kernels/cpu/libpvrt_cpu.so"}

    glibc = {tuple(map(int, found)) for found in re.findall(rb"GLIBC_(\d+)\.(\d+)", library)}
    assert (2, 2) < max(glibc) <= (2, 28), "manylinux_2_28 has no such symbols"
    needed = set(re.findall(rb"\0(lib\w+\.so[.\d]*)\0", library))
    assert needed <= {b"libc.so.6", b"libm.so.6"}, "others would have to come along"
    assert sys.base_prefix.encode() not in library, "a path of this machine"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A repository that dev/release.py calls a release."""
    for name in ("dev/release.py", "pvrt/version.py"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    number = re.search(r'__version__ = "(.+)"', (ROOT / "pvrt/version.py").read_text())
    assert number is not None
    log = f"# Changelog\n\n## Unreleased\n\n## {number[1]} - 2026-01-31\n\n- All.\n"
    (tmp_path / "CHANGELOG.md").write_text(log)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "A release")
    return tmp_path


def refusal(folder: Path, *options: str) -> str:
    command = [sys.executable, "dev/release.py", "--check", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (done.returncode == 0) == (done.stderr == "")
    return done.stderr


@needs_git
def test_a_release_is_a_clean_tree_of_a_version_with_a_dated_section(release: Path) -> None:
    assert not refusal(release)
    assert "change one of them" in refusal(release, "--tag", "v99.0")
    log = release / "CHANGELOG.md"
    log.write_text(log.read_text() + "\n")
    assert "the tree has changes" in refusal(release)
    for before, after in (
        ("Unreleased\n", "Unreleased\n\n### Added\n- More.\n"),
        (" - 2026", " 2026"),
    ):
        git(release, "checkout", "--quiet", "CHANGELOG.md")
        log.write_text(log.read_text().replace(before, after))
        git(release, "commit", "--quiet", "--all", "--message", "No release")
        assert "give them a heading" in refusal(release), after
        git(release, "reset", "--quiet", "--hard", "HEAD~1")


@needs_git
def test_a_version_is_released_once(release: Path) -> None:
    number = re.search(r"## (\d.*) - ", (release / "CHANGELOG.md").read_text())
    assert number is not None
    git(release, "tag", f"v{number[1]}")
    assert not refusal(release, "--tag", f"v{number[1]}")
    git(release, "commit", "--quiet", "--allow-empty", "--message", "Later")
    assert "raise the version" in refusal(release)


def test_the_host_runs_what_everybody_runs_on_a_supported_python() -> None:
    python = SpecifierSet(PROJECT["project"]["requires-python"])
    commands = []
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"].values():
            for step in job["steps"]:
                commands.append(step.get("run", ""))
                if "python-version" in step.get("with", {}):
                    assert python.contains(step["with"]["python-version"])
    assert ".ci/run" in commands
    rules = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands:
        for program, argument in re.findall(r"(make|python3) (\S+)", command):
            assert argument in rules if program == "make" else (ROOT / argument).is_file(), command


def test_wheels_are_tagged_alike_here_and_on_the_host() -> None:
    source = (ROOT / "dev" / "release.py").read_text(encoding="utf-8")
    platform_here = re.search(r'^PLATFORM = "(\w+)"$', source, re.MULTILINE)
    assert platform_here is not None
    settings = PROJECT["tool"]["cibuildwheel"]
    for machine in ("x86_64", "aarch64"):
        assert settings[f"manylinux-{machine}-image"] == platform_here[1]
        assert f"cp311-manylinux_{machine}" in settings["build"]
