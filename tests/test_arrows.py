"""Which room of a package may use which: the graph of ARCHITECTURE.md, drawn from the imports.

A room is a sub-package, or a module that lies in the package's own folder. `__init__` is the
package's front door: what it exports.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "pvrt_kernels": ROOT / "kernels" / "pvrt_kernels",
    "pvrt": ROOT / "pvrt",
    "pvrt_tune": ROOT / "tune" / "pvrt_tune",
    "pvrt_server": ROOT / "server" / "pvrt_server",
}

#: Lines of rooms, the used ones first: every room may use all that lie before its arrow, and what
#: these may use. Rooms between commas do not know each other.
ARROWS = {
    "pvrt_kernels": """
        reference <- dispatch <- packed <- cpu, gpu <- ops <- grouped <- __init__
    """,
    "pvrt": """
        errors, kv_cache, memory <- format <- modules <- hf, vllm_plugin
        lock, format <- tools
        errors <- versions <- tools, vllm_plugin, __init__
        errors <- device, instruction_set <- cli
        hf <- __init__
        hf, vllm_plugin, tools, __init__ <- cli <- __main__
    """,
    "pvrt_tune": """
        setting_types <- settings <- config <- options <- pipeline
        parallel <- randomness <- run
        progress <- settings, data, machine, parallel
        data <- model_blocks
        settings, data, model_blocks, machine, parallel <- run, fit
        run, fit <- calibrate, write_checkpoint
        run <- shards <- pv
        calibrate, write_checkpoint <- pv <- plan <- pipeline <- __init__
    """,
    "pvrt_server": """
        errors, options, templates <- opened <- capacity <- backend <- engine <- api
        templates, opened <- web <- api
        api <- vllm
        vllm, snippets, self_test <- launch <- __init__
    """,
}

#: Arrows that point up today: (module, room that it uses) and what will turn them.
EXCEPTIONS = {
    ("pvrt_tune.settings", "fit"): "issue 17, point 2: settings are a leaf",
    ("pvrt_tune.settings", "calibrate"): "issue 17, point 2: settings are a leaf",
    ("pvrt_tune.settings", "pv"): "issue 17, point 2: settings are a leaf",
    ("pvrt_tune.options", "pv"): "issue 17, point 2: settings are a leaf",
    ("pvrt_tune.write_checkpoint", "calibrate"): "issue 17, point 3: Run reads its pieces",
}


@dataclass(frozen=True)
class Use:
    """Module `user` uses module or package `used` of its own package."""

    user: str
    used: str
    lazily: bool


def module_name(package: str, file: Path) -> str:
    parts = file.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join((package, *parts))


@cache
def uses() -> tuple[Use, ...]:
    """Every import of one of our modules by another, whatever its package."""
    files = {
        module_name(package, file): file
        for package, root in PACKAGES.items()
        for file in root.rglob("*.py")
    }
    modules = {name.removesuffix(".__init__") for name in files}
    return tuple(use for name, file in files.items() for use in _uses_of(name, file, modules))


def _uses_of(name: str, file: Path, modules: set[str]) -> Iterator[Use]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        lazily = node not in tree.body
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in modules:
                    yield Use(name, alias.name, lazily)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Use(name, inner if inner in modules else node.module, lazily)


def room(module: str) -> str:
    """pvrt.format.aqlm lies in format, pvrt itself in __init__."""
    return (*module.split("."), "__init__")[1]


def package(module: str) -> str:
    return module.split(".")[0]


@cache
def allowed(name: str) -> dict[str, set[str]]:
    """Per room all rooms that it may use. Raises CycleError for arrows that go round."""
    direct: dict[str, set[str]] = {}
    for line in filter(None, map(str.strip, ARROWS[name].splitlines())):
        tiers = [[part.strip() for part in tier.split(",")] for tier in line.split("<-")]
        for tier in tiers:
            for user in tier:
                direct.setdefault(user, set())
        for below, tier in pairwise(tiers):
            for user in tier:
                direct[user] |= set(below)
    found: dict[str, set[str]] = {}
    for user in TopologicalSorter(direct).static_order():
        found[user] = direct[user].union(*(found[below] for below in direct[user]))
    return found


def arrows(name: str) -> dict[tuple[str, str], set[str]]:
    """(user's room, used room) of a package, and the modules that draw the arrow."""
    found: dict[tuple[str, str], set[str]] = {}
    for use in uses():
        if package(use.user) == package(use.used) == name and room(use.user) != room(use.used):
            found.setdefault((room(use.user), room(use.used)), set()).add(use.user)
    return found


@pytest.mark.parametrize("name", PACKAGES)
def test_every_room_has_its_place(name: str) -> None:
    files = PACKAGES[name].rglob("*.py")
    rooms = {room(module_name(name, file)) for file in files}
    assert rooms == allowed(name).keys()


@pytest.mark.parametrize("name", PACKAGES)
def test_arrows_point_down(name: str) -> None:
    up = {
        (module, below)
        for (user, below), modules in arrows(name).items()
        for module in modules
        if below not in allowed(name)[user]
    }
    assert up == {exception for exception in EXCEPTIONS if package(exception[0]) == name}


def test_no_modules_import_in_a_circle() -> None:
    used: dict[str, set[str]] = {}
    for use in uses():
        used.setdefault(use.user.removesuffix(".__init__"), set()).add(use.used)

    def reached(module: str) -> set[str]:
        found: set[str] = set()
        ahead = [module]
        while ahead:
            new = used.get(ahead.pop(), set()) - found
            found |= new
            ahead += new
        return found

    assert [module for module in used if module in reached(module)] == []


def test_only_the_command_line_looks_up_and_only_when_it_runs() -> None:
    for use in uses():
        if package(use.user) == "pvrt" and package(use.used) in ("pvrt_tune", "pvrt_server"):
            assert room(use.user) == "cli", use
            assert use.lazily, use
