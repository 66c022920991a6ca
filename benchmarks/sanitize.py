"""The tests of the C kernels over libraries with sanitizers: `make sanitize`.

    python benchmarks/sanitize.py

AddressSanitizer and UndefinedBehaviorSanitizer watch the library inside of Python;
ThreadSanitizer, which knows no OpenMP, watches a program of its own (tsan_driver.c), as the other
two do once more. Every instruction set that this CPU has is run, AVX-512 natively or by a model.
Writes the key `sanitizers` of results/reliability.json: tests passed, and reports.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import results

_SOURCES = machine.ROOT / "kernels" / "pvrt_kernels" / "cpu" / "csrc"
_TESTS = machine.ROOT / "tests" / "kernels" / "cpu"
_REPORT = re.compile(r"runtime error: .*|ERROR: AddressSanitizer: .*|WARNING: ThreadSanitizer: .*")
_SETS = re.compile(r"^(\S+: tested .*) \(", re.MULTILINE)


def build(sanitizer: str, folder: Path) -> Path:
    """The library with a sanitizer."""
    target = folder / f"lib{sanitizer}.so"
    flags = ["-std=c11", "-g", "-O1", "-fno-math-errno", "-shared", "-fPIC"]
    flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    files = map(str, sorted(_SOURCES.glob("*.c")))
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, *flags, "-o", str(target), *files, "-lm"], check=True)
    return target


def run_tests(environment: dict[str, str], *which: str) -> dict[str, Any]:
    """Tests of the kernels: how many passed and failed, on what, and what was reported."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-s", *map(str, which)]
    done = subprocess.run(
        command,
        cwd=machine.ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    counts = {
        word: int(found[1]) if (found := re.search(rf"(\d+) {word}", said)) else 0
        for word in ("passed", "failed", "skipped")
    }
    reports = _REPORT.findall(said)
    if done.returncode:
        print(said[-4000:], file=sys.stderr)
    return {
        **counts,
        "exit_code": done.returncode,
        "reports": len(reports),
        "first_reports": reports[:3],
        "instruction_sets": _SETS.findall(said),
    }


def main() -> None:
    """Build, test, and write what was found."""
    found: dict[str, Any] = {}
    inside = sorted({*_TESTS.glob("test_*.py")} - {_TESTS / "test_sanitizers.py"})
    with tempfile.TemporaryDirectory() as place:
        for sanitizer in ("undefined", "address"):
            environment = {"PVRT_TEST_LIBRARY": str(build(sanitizer, Path(place)))}
            if sanitizer == "address":
                ask = [os.environ.get("CC", "cc"), "-print-file-name=libasan.so"]
                runtime = subprocess.run(ask, capture_output=True, text=True, check=True)
                environment["LD_PRELOAD"] = runtime.stdout.strip()
                # Python and torch give little back before they end.
                environment["ASAN_OPTIONS"] = "detect_leaks=0"
            found[sanitizer] = run_tests(environment, *map(str, inside))
    found["thread, and the driver"] = run_tests({}, str(_TESTS / "test_sanitizers.py"))
    results.store("reliability", {**(results.load("reliability") or {}), "sanitizers": found})
    print(json.dumps(found, indent=1))
    sys.exit(any(each["exit_code"] or each["reports"] for each in found.values()))


if __name__ == "__main__":
    main()
