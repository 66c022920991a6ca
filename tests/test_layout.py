"""The house: which way imports point, what is installed, and what must stay light."""

import subprocess
import sys
import tomllib

import pytest

from tests.fixtures.imports import PACKAGES, ROOT, package, room, uses

MAY_IMPORT = {
    "pvrt_kernels": set(),
    "pvrt": {"pvrt_kernels"},
    "pvrt_tune": {"pvrt_kernels", "pvrt"},
    "pvrt_server": {"pvrt_kernels", "pvrt"},
}


@pytest.mark.parametrize("name", PACKAGES)
def test_imports_point_one_way(name: str) -> None:
    for use in uses():
        if package(use.user) == name and room(use.user) != "cli":  # looks up, but lazily
            assert package(use.used) in MAY_IMPORT[name] | {name}, use


@pytest.mark.parametrize("folder", ["kernels", "tune", "server"])
def test_source_roots_are_not_packages(folder: str) -> None:
    """`kernels/__init__.py` would shadow the PyPI package that transformers imports."""
    assert not (ROOT / folder / "__init__.py").exists()


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_imports_from_the_repository_root() -> None:
    run("-c", "import transformers; from transformers import LlamaForCausalLM")


def test_help_loads_no_torch() -> None:
    script = (
        "import sys; sys.argv = ['pvrt', {args}]\n"
        "from pvrt.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "heavy = {{'torch', 'transformers', 'vllm', 'fastapi'}} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for args in ("'--help'", "'tune', '--help'", "'serve', '--help'", "'--version'"):
        run("-c", script.format(args=args))


def test_the_wheel_installs_our_four_names_only() -> None:
    from setuptools import find_packages  # type: ignore[import-untyped]

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    find = project["tool"]["setuptools"]["packages"]["find"]
    names = set()
    for where in find["where"]:
        found = find_packages(str(ROOT / where), include=find["include"])
        names |= {name.split(".")[0] for name in found}
    assert names == set(PACKAGES)


def test_no_module_is_long() -> None:
    for root in PACKAGES.values():
        for file in root.rglob("*.py"):
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 500, file


def test_readme_tables_come_from_the_result_files() -> None:
    run("benchmarks/tables.py", "--check")
