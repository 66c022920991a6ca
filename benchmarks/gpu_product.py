"""Does all of pvrt run on a GPU? One call tries everything a user does: writes gpu_product.json.

    .venv/bin/python benchmarks/gpu_product.py --model MODEL --text FILE [--jobs 3]
    .venv/bin/python benchmarks/gpu_product.py --dry-run      # the same on the CPU, smaller

Every item is a process group of its own with a time limit. What fails is recorded with its last
lines and stops nothing; the JSON is written anew after every item. MODEL (SmolLM2-135M, say) is a
folder or a GGUF file, without which the items of a real model are left out. With --jobs, items that
do not need each other run side by side: peaks of memory stay true, seconds are of a shared GPU.
What the items do is in gpu_product_items.py.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
from needs import writable

LAST_LINES = 40
NAME = "gpu_product.json"


@dataclass(frozen=True)
class Item:
    """One process: a function of gpu_product_items, its limit in seconds, and what goes before."""

    name: str
    limit: float
    needs: tuple[str, ...] = ()
    real_model: bool = False


#: In order of importance. The first that has what it needs goes next.
ITEMS = (
    Item("doctor", 60),
    Item("loaded", 150, ("tune", "plan"), real_model=True),
    Item("tune", 240, real_model=True),
    Item("toy", 150),
    Item("plan", 60, real_model=True),
    Item("engine", 120, ("toy",)),
    Item("serve", 90, ("toy",)),
    Item("bench", 90, ("toy",)),
    Item("load_float16", 90, ("toy",)),
    Item("load_bfloat16", 90, ("toy",)),
    Item("sampling", 60, real_model=True),
    Item("layer_fit", 120),
    Item("pv_step", 90),
    Item("variants", 120, ("toy",)),
    Item("layouts", 120),
    Item("tests", 180),
)


@dataclass
class Session:
    """What was asked, where work goes, and what was found."""

    options: argparse.Namespace
    work: Path
    deadline: float
    results: dict[str, Any]
    waiting: list[Item]
    running: set[str] = field(default_factory=set)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def work_through(self) -> None:
        """Run items until none waits."""
        while (item := self.take()) is not None:
            try:
                self.record(item, self.attempt(item))
            finally:
                with self.changed:
                    self.running.remove(item.name)
                    self.changed.notify_all()

    def take(self) -> Item | None:
        """The first item whose needs have been tried; waits for one. None when all are taken."""
        with self.changed:
            while self.waiting:
                ahead = self.running | {item.name for item in self.waiting}
                for item in self.waiting:
                    if ahead.isdisjoint(item.needs):
                        self.waiting.remove(item)
                        self.running.add(item.name)
                        return item
                self.changed.wait()
        return None

    def attempt(self, item: Item) -> dict[str, Any]:
        """The record of one item."""
        left = min(item.limit * self.options.patience, self.deadline - time.monotonic())
        if left <= 1:
            return {"passed": False, "failures": {item.name: ["no time left"]}, "seconds": 0.0}
        log, found = self.work / f"{item.name}.log", self.work / f"{item.name}.json"
        command = [sys.executable, str(Path(__file__).with_name("gpu_product_items.py")), item.name]
        command += ["--folder", str(self.work), "--device", self.options.device]
        command += ["--dry-run"] if self.options.dry_run else []
        for name in ("model", "text"):
            given = getattr(self.options, name)
            command += [f"--{name}", str(given.absolute())] if given else []
        started = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                problem = f"exit code {code}" if (code := process.wait(left)) else None
            except subprocess.TimeoutExpired:
                problem = f"not finished after {left:.0f} s"
            finally:  # also what it has started and left behind
                stop(process)
        record: dict[str, Any] = {"seconds": time.monotonic() - started}
        record |= {"failures": {}, "figures": {}}
        if found.is_file():
            record |= json.loads(found.read_text())
        if problem is not None:
            record["failures"][item.name] = [problem, *last_lines(log)]
        return {"passed": not record["failures"], **record}

    def record(self, item: Item, record: dict[str, Any]) -> None:
        """Store an item and say how it went."""
        with self.changed:
            self.results["items"][item.name] = record
            text = json.dumps(self.results, indent=1) + "\n"
            staged = self.options.out / f"{NAME}.partial"
            staged.write_text(text)
            os.replace(staged, self.options.out / NAME)
            word = "passed" if record["passed"] else f"FAILED: {', '.join(record['failures'])}"
            print(f"{item.name}: {record['seconds']:.1f} s, {word}", flush=True)
            for lines in record["failures"].values():
                print("    " + "\n    ".join(lines[-6:]), flush=True)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all of its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def last_lines(log: Path) -> list[str]:
    """The end of a log, without the redrawn lines of progress bars."""
    lines = log.read_text(errors="replace").splitlines()
    return [line.rpartition("\r")[2][:400] for line in lines[-LAST_LINES:]]


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """The card, its driver and the versions."""
    import torch

    found = {**machine.describe(), "dry_run": options.dry_run, "jobs": options.jobs}
    if options.device != "cpu":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True)
        found |= {"gpu": torch.cuda.get_device_name(), "driver": answer.stdout.strip()}
    return found


def main() -> None:
    """Run the items and end with 1 if one failed."""
    names = [item.name for item in ITEMS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, smaller")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, help="folder for the result")
    parser.add_argument("--work", type=Path, help="folder for models and logs, which stays")
    parser.add_argument("--model", type=Path, help="a real model: a folder or a GGUF file")
    parser.add_argument("--text", type=Path, help="text to calibrate the toy and to measure on")
    parser.add_argument("--jobs", type=int, default=1, help="items at once")
    parser.add_argument("--minutes", type=float, default=8.0, help="time in all")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on all time limits")
    options = parser.parse_args()
    options.device = "cpu" if options.dry_run else "cuda"
    options.out = options.out or machine.ROOT / "benchmarks" / "results"
    if (problem := writable(options.out)) is not None:
        sys.exit(f"gpu_product: {problem}")
    options.out.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // options.jobs)))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    chosen = [item for item in ITEMS if item.name in options.only]
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + 60 * options.minutes
        chosen = [item for item in chosen if options.model or not item.real_model]
        session = Session(options, work, deadline, {**describe(options), "items": {}}, chosen)
        with ThreadPoolExecutor(options.jobs) as pool:
            for worker in [pool.submit(session.work_through) for _ in range(options.jobs)]:
                worker.result()
    sys.exit(0 if all(item["passed"] for item in session.results["items"].values()) else 1)


if __name__ == "__main__":
    main()
