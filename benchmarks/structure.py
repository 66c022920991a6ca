"""The shape of the sources: `python benchmarks/structure.py` writes results/structure.json.

    python benchmarks/structure.py --check    # part of `make check`

Per package: files and lines of Python and C, the longest function and the one with the most
parameters, and the graph that tests/fixtures/imports.py draws: rooms, the floors that they stand
on, the arrows between them. The check fails when the file is not what the sources say, or when a
source file is longer than it may be.
"""

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine

sys.path.insert(0, str(machine.ROOT))
from tests.fixtures.imports import FOLDERS, PACKAGES, arrows, floors, parsed, rooms

RESULT = machine.ROOT / "benchmarks" / "results" / "structure.json"
SUFFIXES = (".py", ".c", ".h")
AIM = 400  # lines of a file
#: Files that are longer today, and how long they may be. A shorter one leaves this list.
LONGER = {
    "tests/pvrt/vllm_plugin/test_plugin.py": 620,
    "tests/tune/pv/test_pv_tuning.py": 600,
    "tests/tune/test_pipeline.py": 650,
}


def sources(root: Path) -> list[Path]:
    return sorted(file for file in root.rglob("*") if file.suffix in SUFFIXES)


def length(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def functions(root: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function in Python, the inner ones too, and where it stands."""
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{file.relative_to(machine.ROOT)}:{node.name}", node


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """What a caller can hand over; a method's own object is not counted."""
    given = node.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    variable = sum(each is not None for each in (given.vararg, given.kwarg))
    return len(names) - (names[:1] in (["self"], ["cls"])) + variable


def shape(name: str, root: Path) -> dict[str, Any]:
    """The row of one package."""
    files = sources(root)
    longest, lines = max(
        ((where, (node.end_lineno or 0) - node.lineno + 1) for where, node in functions(root)),
        key=lambda each: each[1],
    )
    widest, most = max(
        ((where, parameters(node)) for where, node in functions(root)), key=lambda each: each[1]
    )
    return {
        "files": len(files),
        "lines": sum(map(length, files)),
        "longest_function": {"lines": lines, "where": longest},
        "most_parameters": {"parameters": most, "where": widest},
        "rooms": len(rooms(name)),
        "floors": floors(name),
        "arrows": len(arrows(name)),
    }


def too_long() -> Iterator[str]:
    """A sentence per file that is longer than it may be, or is allowed more than it needs."""
    for root in (PACKAGES | FOLDERS).values():
        for file in sources(root):
            name = str(file.relative_to(machine.ROOT))
            lines, limit = length(file), LONGER.get(name, AIM)
            if lines > limit:
                yield f"{name} has {lines} lines, more than {limit}: split it"
            elif name in LONGER and lines <= AIM:
                yield f"{name} has only {lines} lines: take it out of LONGER"
    for name in LONGER:
        if not (machine.ROOT / name).is_file():
            yield f"{name} is gone: take it out of LONGER"


def main() -> int:
    """Write the file, or check it. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it is stale")
    check: bool = parser.parse_args().check
    packages = PACKAGES | FOLDERS
    text = json.dumps({name: shape(name, root) for name, root in packages.items()}, indent=1) + "\n"
    problems = list(too_long())
    if not check:
        RESULT.write_text(text, encoding="utf-8")
    elif not RESULT.is_file() or RESULT.read_text(encoding="utf-8") != text:
        problems.append(f"{RESULT.name} is stale: run python benchmarks/structure.py")
    for problem in problems:
        print(f"structure: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
