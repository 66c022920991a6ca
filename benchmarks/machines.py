"""Runs `make quickstart` and `make test` and records this machine: results/machines.json.

    make machines

One row per machine that ever ran it: the same processor, kernels and kind of environment (at the
lock's versions or not) replaces its row, everything else is kept. Failures are recorded too, and
end the script with 1.
"""

import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import machine
import needs
import results

from pvrt.lock import compare
from pvrt_kernels.cpu.library import instruction_set

ROOT = machine.ROOT
TUNED = ROOT / "runs" / "quickstart"
KEY = ("cpu", "isa", "locked")
# "== 3 failed, 1669 passed, 12 skipped, 2 errors in 512.33s (0:08:32) ==", framed or not.
_CLOSING = re.compile(
    r"^=* ?(?P<counts>\d+ [a-z]+(?:, \d+ [a-z]+)*) in (?P<seconds>[\d.]+)s\b", re.M
)


def closing_line(output: str) -> dict[str, Any] | None:
    """Tests that passed and failed (errors are failures), and seconds, from pytest's last line.

    None where pytest did not come to its end.
    """
    found = list(_CLOSING.finditer(output))
    if not found:
        return None
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) ([a-z]+)", found[-1]["counts"])}
    return {
        "tests_passed": counts.get("passed", 0),
        "tests_failed": sum(counts.get(kind, 0) for kind in ("failed", "error", "errors")),
        "test_seconds": float(found[-1]["seconds"]),
    }


def merged(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with this machine's new one in the place of its old one."""
    all_rows = results.renewed(rows, [row], *KEY)
    return sorted(all_rows, key=lambda each: tuple(str(each[name]) for name in KEY))


def make(target: str) -> tuple[int, str]:
    """Run a target of the Makefile, shown while it runs. Returns its exit code and output."""
    process = subprocess.Popen(
        ["make", target], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def run_quickstart() -> dict[str, Any] | None:
    """What the quickstart found; None if it failed."""
    code, _ = make("quickstart")
    if code:
        return None
    found: dict[str, Any] = json.loads(TUNED.with_suffix(".json").read_text(encoding="utf-8"))
    return found


def run_tests() -> dict[str, Any]:
    """The figures of `closing_line`; ends the script if the suite could not run."""
    _, output = make("test")
    figures = closing_line(output)
    if figures is None:
        sys.exit("machines: make test ended before its closing line")
    return figures


def main() -> None:
    """Run both, store the row."""
    needs.check("machines", [needs.writable(results.FOLDER)])
    quickstart = run_quickstart()
    tests = run_tests()
    comparison = compare()
    row = {
        "cpu": machine.processor(),
        "isa": instruction_set() or "none",
        "date": datetime.now(UTC).date().isoformat(),
        **tests,
        "quickstart_seconds": quickstart and round(quickstart["seconds"], 1),
        "quickstart_answer": quickstart and quickstart["answer"],
        "locked": comparison is not None and not comparison.differing,
    }
    results.store("machines", merged(results.load("machines"), row))
    print(json.dumps(row, indent=1))
    sys.exit(1 if quickstart is None or tests["tests_failed"] else 0)


if __name__ == "__main__":
    main()
