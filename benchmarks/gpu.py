"""All that is to be known of a GPU, in one call: writes gpu_CARD.json, gpu_rows.jsonl and gpu.log.

    python benchmarks/gpu.py --minutes 9 --jobs 16      # checks first, then times
    python benchmarks/gpu.py --product "python benchmarks/gpu_product.py --jobs 3"
    python benchmarks/gpu.py --only ceilings correctness gemv --limit gemv=40
    python benchmarks/gpu.py --dry-run                  # Triton's interpreter, tiny shapes, no GPU

Needs torch, Triton, safetensors, this repository (PYTHONPATH=.:tune:server:kernels if it is not
installed) and no network. Every section is a forked process with a limit, at which its whole
group is killed: a hang, a spoiled CUDA context or a lack of memory in one costs the others nothing.
Rows are written as they are measured, so a killed section keeps its own; the JSON is written after
every section and names what failed or was not reached. Meanwhile, with --jobs, `gpu_warm.py` fills
Triton's cache.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import machine

Row = dict[str, Any]
FOLDER = Path(__file__).resolve().parent
#: Most seconds of each section, in the order in which they run.
LIMITS = {
    "product": 90,
    "ceilings": 20,
    "correctness": 60,
    "gemv": 90,
    "native": 60,
    "model": 75,
    "tuning": 90,
    "crossover": 90,
    "autotune": 120,
    "tools": 120,
}
NEEDS_NO_WARMTH = ("product", "ceilings")
LEAST = 5.0  # seconds: a CUDA context takes one or two
CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"


def nvidia_smi(query: str) -> list[str]:
    """What the driver says of the first card, one string per name; nothing without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return []
    first = done.stdout.strip().splitlines()[:1] if done.returncode == 0 else []
    return [value.strip() for value in first[0].split(",")] if first else []


def clocks() -> Row:
    """Clocks, temperature and power of now."""
    return dict(zip(CLOCKS.split(","), nvidia_smi(CLOCKS), strict=False))


class Process:
    """A forked child in a group of its own, whose output goes to the end of the log."""

    def __init__(self, action: Callable[[], None], log: Path) -> None:
        self.action, self.log, self.started = action, log, time.monotonic()
        self.start = log.stat().st_size
        self.child = multiprocessing.get_context("fork").Process(target=self._run)
        self.child.start()

    def _run(self) -> None:
        os.setsid()
        with self.log.open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        self.action()

    def wait(self, seconds: float) -> str:
        """What went wrong by the time it ended or was killed; nothing if all is well."""
        try:
            self.child.join(max(0.0, seconds))
            code = self.child.exitcode
        finally:
            self.kill()
        if code is None:
            return f"killed at its limit of {time.monotonic() - self.started:.0f} s"
        if code < 0:
            return f"died by {signal.Signals(-code).name}"
        lines = self.log.read_bytes()[self.start :].decode(errors="replace").strip().splitlines()
        return f"ended with code {code}: {lines[-1] if lines else 'no output'}" if code else ""

    def kill(self) -> None:
        """End the whole group and every other group that it has started."""
        assert self.child.pid is not None
        for pid in [*descendants(self.child.pid), self.child.pid]:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.child.join()


def execute(command: list[str]) -> None:
    """Become another program."""
    os.execvp(command[0], command)


def descendants(parent: int) -> list[int]:
    """Numbers of all processes below one, as /proc tells them."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            above = int(file.read_text().rpartition(")")[2].split()[1])
            children.setdefault(above, []).append(int(file.parent.name))
    found = [parent]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


@dataclass
class Run:
    """The call as a whole: its options, the time it has, and what it found."""

    options: argparse.Namespace
    card: str
    deadline: float
    results: Row = field(default_factory=dict)
    warming: Process | None = None

    def __post_init__(self) -> None:
        folder: Path = self.options.out
        folder.mkdir(parents=True, exist_ok=True)
        self.rows, self.log = folder / "gpu_rows.jsonl", folder / "gpu.log"
        self.rows.write_text("")
        self.log.write_text("")
        stem = re.sub(r"[^a-z0-9]+", "_", self.card.lower()).strip("_")
        self.file = folder / f"gpu_{stem}.json"

    @property
    def left(self) -> float:
        """Seconds until the whole call should be over."""
        return self.deadline - time.monotonic()

    def action(self, section: str, limit: float) -> Callable[[], None]:
        """The section, which ends by itself a little before its limit."""
        own = limit - max(2.0, 0.1 * limit)
        if section == "product":
            command = [*shlex.split(self.options.product), "--out", str(self.options.out)]
            return partial(execute, [*command, "--minutes", str(0.8 * own / 60)])
        import gpu_section  # torch, seconds that the forked sections need not spend again

        gpu_section.preload()
        return partial(gpu_section.run, section, self.options, self.rows, time.time() + own)

    def section(self, name: str, limit: float) -> None:
        """Run one section, for as long as it and the whole call may; store all."""
        if self.warming and name not in NEEDS_NO_WARMTH:
            self.warm(min(60.0, self.left))
        limit = min(limit, self.left)
        if limit < LEAST and not self.options.dry_run:
            self.finish(name, 0.0, {}, "no time left")
            return
        before, action = clocks(), self.action(name, limit)
        process = Process(action, self.log)
        trouble = process.wait(limit)
        self.finish(name, time.monotonic() - process.started, before, trouble)

    def warm(self, seconds: float) -> None:
        """Wait for the compilers that were started with the first section."""
        assert self.warming is not None
        process, self.warming = self.warming, None
        trouble = process.wait(seconds)
        self.finish("warm", time.monotonic() - process.started, {}, trouble)

    def finish(self, name: str, seconds: float, before: Row, trouble: str) -> None:
        """Store what a section came to."""
        record = {"seconds": round(seconds, 2), "trouble": trouble}
        if before:
            record |= {"before": before, "after": clocks()}
        self.results["sections"][name] = record
        self.store()
        print(f"{name}: {seconds:.1f} s {trouble}", flush=True)

    def store(self) -> None:
        """Write the JSON anew, with all rows that there are."""
        rows: dict[str, list[Row]] = {}
        for line in self.rows.read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row.pop("section"), []).append(row)
        staged = self.file.with_suffix(".tmp")
        staged.write_text(json.dumps({**self.results, "rows": rows}, indent=1) + "\n")
        staged.replace(self.file)


def summary(results: Row) -> str:
    """The short table that is printed last."""
    rows: dict[str, list[Row]] = results["rows"]
    lines = [f"{results['gpu']}, torch {results['torch']}, Triton {results['triton']}"]
    checked = [row for row in rows.get("correctness", []) if "passed" in row]
    lines.append(f"{sum(row['passed'] for row in checked)} of {len(checked)} products are right")
    for row in rows.get("gemv", []):
        if "microseconds" in row:
            peers = "".join(f"  {k} {v:.2f}x" for k, v in row.items() if k.startswith("over_"))
            lines.append(
                f"{row['layer'][0]:>6} x {row['layer'][1]:<6} {row['tokens']} tokens  "
                f"{row['microseconds']:8.1f} us  {row['of_copy_bandwidth']:5.0%} of copy{peers}"
            )
    for row in rows.get("model", []):
        if "tokens_per_second" in row:
            lines.append(
                f"{row['model']}, {row['weights']}: {row['tokens_per_second']:.1f} tokens/s, "
                f"{row['of_copy_bandwidth']:5.0%} of copy bandwidth"
            )
    for name, section in rows.items():
        for row in section:
            if "error" in row and "case" in row:
                lines.append(f"{name}, {row['case'][:100]}: {row['error'][:200]}")
            if "not_reached" in row:
                lines.append(f"{name}: {len(row['not_reached'])} cases were not reached")
    trouble = {name: each["trouble"] for name, each in results["sections"].items()}
    return "\n".join(lines + [f"{name}: {text}" for name, text in trouble.items() if text])


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--minutes", type=float, default=9.0, help="time in all")
    parser.add_argument("--limit", nargs="+", default=[], metavar="SECTION=SECONDS")
    parser.add_argument(
        "--out", type=Path, default=FOLDER / "results", help="folder for the results"
    )
    parser.add_argument("--product", metavar="COMMAND", help="gpu_product.py with its options")
    parser.add_argument("--peer", type=Path, help="the aqlm package's codebook_cuda.so")
    parser.add_argument("--native", type=Path, help="Python file whose run(bench) yields rows")
    parser.add_argument("--jobs", type=int, default=0, help="processes that fill Triton's cache")
    options = parser.parse_args()
    try:
        options.limit = {k: float(v) for k, v in (each.split("=") for each in options.limit)}
    except ValueError:
        parser.error("--limit takes SECTION=SECONDS")
    return options


def main() -> None:
    """Run the sections in order, store after each, print the table."""
    options = arguments()
    name = nvidia_smi("name")
    if not name and not options.dry_run:
        sys.exit("nvidia-smi finds no GPU here; --dry-run tries the script itself on the CPU")
    card = "interpreter" if options.dry_run else name[0]
    run = Run(options, card, time.monotonic() + 60 * options.minutes)
    run.results |= {
        "gpu": card,
        "driver": "".join(nvidia_smi("driver_version")),
        "torch": version("torch"),
        "triton": version("triton"),
        "python": platform.python_version(),
        "commit": machine.commit(),
        "dry_run": options.dry_run,
        "sections": {},
    }
    run.store()
    os.environ |= {"PYTHONUNBUFFERED": "1", "OUT": str(options.out)}
    # Inductor's workers take longer to start than its few kernels take to compile.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for a GPU before a fork starts none
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    if options.jobs and not options.dry_run:
        command = [sys.executable, str(FOLDER / "gpu_warm.py"), "--jobs", str(options.jobs)]
        run.warming = Process(partial(execute, command), run.log)
    try:
        for section, limit in LIMITS.items():
            given = section not in ("product", "native") or getattr(options, section)
            if section in options.only and given:
                run.section(section, options.limit.get(section, limit))
    finally:
        if run.warming:
            run.warming.kill()
    results = json.loads(run.file.read_text())
    print(summary(results))
    sys.exit(1 if any(each["trouble"] for each in results["sections"].values()) else 0)


if __name__ == "__main__":
    main()
