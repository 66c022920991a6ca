"""The house: which way imports point, what is installed, and what must stay light."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

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
        if package(use.user) == name and room(use.user) not in ("api", "cli"):  # they do, lazily
            assert package(use.used) in MAY_IMPORT[name] | {name}, use


def test_no_function_of_tune_takes_more_than_five_values() -> None:
    """Stages are handed a Run. `self`, `cls` and autograd's `ctx` are no choice of a caller."""
    for file in PACKAGES["pvrt_tune"].rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                taken = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                names = [argument.arg for argument in taken]
                given = [name for name in names if name not in ("self", "cls", "ctx")]
                assert len(given) <= 5, f"{file}: {node.name}({', '.join(names)})"


@pytest.mark.parametrize("folder", ["kernels", "tune", "server"])
def test_source_roots_are_not_packages(folder: str) -> None:
    """`kernels/__init__.py` would shadow the PyPI package that transformers imports."""
    assert not (ROOT / folder / "__init__.py").exists()


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_imports_from_the_repository_root() -> None:
    """There our folder named kernels comes before a package of that name."""
    assert str(ROOT) in sys.path
    assert importlib.import_module("transformers").LlamaForCausalLM


def test_help_loads_no_torch() -> None:
    script = (
        "import sys\n"
        "from pvrt.cli import app\n"
        "for words in ('--help', 'tune --help', 'serve --help', '--version'):\n"
        "    try: app(words.split())\n"
        "    except SystemExit as ended: assert not ended.code, words\n"
        "    heavy = {'torch', 'transformers', 'vllm', 'fastapi'} & set(sys.modules)\n"
        "    assert not heavy, f'{words} loads {heavy}'\n"
        "print('all')"
    )
    assert run("-c", script).endswith("all\n")


def test_the_wheel_installs_our_four_names_only() -> None:
    from setuptools import find_packages  # type: ignore[import-untyped]

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    find = project["tool"]["setuptools"]["packages"]["find"]
    names = set()
    for where in find["where"]:
        found = find_packages(str(ROOT / where), include=find["include"])
        names |= {name.split(".")[0] for name in found}
    assert names == set(PACKAGES)


def test_readme_tables_come_from_the_result_files() -> None:
    run("benchmarks/tables.py", "--check")


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
#: A file's name may begin in a package, as it is imported, or in the repository.
STARTS = (ROOT, *(root.parent for root in PACKAGES.values()))


def place_of(path: str) -> Path | None:
    """The file or folder that a page means."""
    return next((start / path for start in STARTS if (start / path).exists()), None)


def defined_in(file: Path) -> set[str]:
    """Functions and classes of a module, methods as Class.method, and what a package exports."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and file.name == "__init__.py":
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.add(f"{node.name}.{part.name}")
    return found


def test_every_function_that_architecture_names_is_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    assert len(named) > 20
    for path, name in named:
        file = place_of(path)
        assert file is not None and name in defined_in(file), f"{path}:{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_source_file_and_module_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\b((?:[\w.-]+/)+[\w-]+\.(?:py|c|h|md|toml))\b", text):
        assert (page.parent / path).exists() or place_of(path), path
    for dotted in set(re.findall(r"`(pvrt(?:_\w+)?(?:\.\w+)+)", text)) - {
        "pvrt.json",
        "pvrt.service",
    }:
        module, name = dotted.replace(".", "/"), ""
        while not place_of(f"{module}.py") and not place_of(module):
            module, _, last = module.rpartition("/")
            name = f"{last}.{name}".rstrip(".")
        file = place_of(f"{module}.py") or place_of(f"{module}/__init__.py")
        assert not name or (file and name in defined_in(file)), dotted
