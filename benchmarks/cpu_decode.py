"""Whole models on the CPU, ours against llama.cpp and transformers: results/cpu_decode.json.

    PEERS/bin/python benchmarks/cpu_decode.py --models FOLDER    # with gguf and llama_cpp

Models of known shapes with random weights (`cpu_shapes`), written to FOLDER at the first run. Every
engine is a process with its model loaded; in every round each in turn reads a prompt of 512 tokens
and then decodes greedily, while the others sleep. With one thread times are process CPU time, which
other work on the machine barely disturbs, and the median counts; with two the best wall time.
bandwidth_fraction: weights that a token reads, over what as many threads read from memory at best.
isa: what this CPU has of the instruction sets of our kernels.
Rows are stored after every answer, so a run that is stopped loses nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import cpu_shapes
import machine
import results

KEY = ("model", "engine", "format", "threads", "isa")
PROMPT = 512
ENGINES = {
    "pvrt": ["2x8g8", "1x16g8"],
    "llama.cpp": ["q2_k", "iq2_xxs", "q4_0"],
    "transformers": ["bfloat16", "float32"],
}


class Ours:
    """The embedded engine's model."""

    def __init__(self, folder: Path, shape: str, scheme: str, threads: int) -> None:
        import torch

        import pvrt
        from pvrt.modules.whole_model import pack_model
        from pvrt_server.engine.cpu_model import CpuModel

        torch.set_num_threads(threads)
        path = cpu_shapes.write_aqlm(folder / f"{shape}-{scheme}", shape, scheme)
        self.file_bytes = (path / "model.safetensors").stat().st_size
        model = pvrt.load(path, dtype=torch.float32)
        pack_model(model, torch.float32)
        self.model = CpuModel(model, rounds=True)  # as models published in 16 bits are served
        self.bytes_per_token = self.model.bytes_per_token
        self.state: Any = None

    def prompt(self, tokens: list[int]) -> int:
        self.state = self.model.start()
        return int(self.model.read(self.state, tokens, 1).argmax())

    def step(self, token: int) -> int:
        return int(self.model.step([self.state], [token], True).argmax())


class Transformers:
    """transformers, a dense model in one type."""

    def __init__(self, folder: Path, shape: str, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        path = cpu_shapes.write_dense(folder / f"{shape}-dense", shape)
        kind = getattr(torch, dtype)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=kind)
        self.bytes_per_token = sum(p.nbytes for p in self.model.parameters())
        self.file_bytes = self.bytes_per_token
        self.state: Any = None

    def prompt(self, tokens: list[int]) -> int:
        from transformers import DynamicCache

        self.state = DynamicCache(config=self.model.config)
        return self._forward(tokens)

    def step(self, token: int) -> int:
        return self._forward([token])

    def _forward(self, tokens: list[int]) -> int:
        import torch

        from pvrt.kv_cache import cache_name

        output = self.model(
            input_ids=torch.tensor([tokens]), logits_to_keep=1, **{cache_name(): self.state}
        )
        return int(output.logits[0, -1].argmax())


class Llama:
    """llama.cpp with its defaults, quantised by itself."""

    def __init__(self, folder: Path, shape: str, format: str, threads: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        path = cpu_shapes.write_gguf(folder, shape, format)
        self.file_bytes = self.bytes_per_token = path.stat().st_size
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap = False
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = 1024, PROMPT, PROMPT
        context.n_threads = context.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.vocabulary = cpu_shapes.SHAPES[shape][5]

    def prompt(self, tokens: list[int]) -> int:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        return self._forward(tokens)

    def step(self, token: int) -> int:
        return self._forward([token])

    def _forward(self, tokens: list[int]) -> int:
        import numpy as np

        array = (self.api.llama_token * len(tokens))(*tokens)  # the batch has a pointer to it only
        batch = self.api.llama_batch_get_one(array, len(tokens))
        if self.api.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp could not decode")
        found = self.api.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(found, (self.vocabulary,)).argmax())


def work(engine: str, folder: Path, shape: str, format: str, threads: int) -> None:
    """Answer each line on stdin (a number of tokens to decode) with seconds, as JSON."""
    kind: Any = {"pvrt": Ours, "transformers": Transformers, "llama.cpp": Llama}[engine]
    clock = time.process_time if threads == 1 else time.perf_counter
    say = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries write to stdout what they like
    runner = kind(folder, shape, format, threads)
    facts = {"file_bytes": runner.file_bytes, "bytes_per_token": runner.bytes_per_token}
    print(json.dumps(facts), file=say, flush=True)
    import torch

    with torch.inference_mode():
        for line in sys.stdin:
            started = clock()
            token = runner.prompt([5 + i % 1000 for i in range(PROMPT)])
            first = clock() - started
            steps = []
            for _ in range(int(line)):
                started = clock()
                token = runner.step(token)
                steps.append(clock() - started)
            print(json.dumps({"first": first, "steps": steps}), file=say, flush=True)


def measure(
    folder: Path, shape: str, threads: int, rounds: int, tokens: int, formats: list[str]
) -> Iterator[list[dict[str, Any]]]:
    """All engines on one shape: the rows so far, after every answer."""
    jobs = [(engine, f) for engine, own in ENGINES.items() for f in own if f in formats]
    bandwidth = _bandwidth(threads)
    workers = []
    for engine, format in jobs:  # loaded one by one: loading takes both cores and memory
        names = ["--worker", engine, format, shape, str(threads)]
        process = subprocess.Popen(
            [sys.executable, __file__, "--models", str(folder), *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        workers.append((process, json.loads(_line(process))))
    answers: list[list[dict[str, Any]]] = [[] for _ in jobs]
    choose = median if threads == 1 else min
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for number in range(rounds):
        for (process, facts), job, found in zip(workers, jobs, answers, strict=True):
            assert process.stdin is not None
            process.stdin.write(f"{tokens}\n")
            process.stdin.flush()
            found.append(json.loads(_line(process)))
            rate = 1 / choose([step for answer in found for step in answer["steps"]])
            first = choose([answer["first"] for answer in found])
            rows[job] = {
                "model": shape,
                "engine": job[0],
                "format": job[1],
                "bits": round(facts["file_bytes"] * 8 / cpu_shapes.parameters(shape), 2),
                "threads": threads,
                "isa": _isa(),
                "decode_tokens_per_s": round(rate, 2),
                "prompt_tokens_per_s": round(PROMPT / first, 1),
                "ttft_512_s": round(first, 3),
                "bandwidth_fraction": round(rate * facts["bytes_per_token"] / bandwidth, 3),
                "rounds": len(found),
            }
            said = f"{' '.join(job)} {rate:.1f} tokens/s, {first:.2f} s"
            print(f"{shape} {threads} {number}: {said}", file=sys.stderr, flush=True)
            yield list(rows.values())
    for process, _ in workers:
        process.communicate("")


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a worker ended with code {process.wait()}")
    return line


def _isa() -> str:
    from pvrt_kernels.cpu import library, products

    return f"{library.instruction_set()}{' bf16' * products.multiplies_bfloat16()}"


def _bandwidth(threads: int) -> float:
    import torch

    from pvrt_kernels.cpu import library

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    return library.read_bandwidth(3.0, clock=clock)


def main() -> None:
    """Measure, and write the result file with what is there for each model and engine."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=cpu_shapes.SHAPES, default=["llama-1b"])
    formats = [format for own in ENGINES.values() for format in own]
    parser.add_argument("--formats", nargs="+", choices=formats, default=formats)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        engine, format, shape, threads = options.worker
        work(engine, options.models, shape, format, int(threads))
        return
    for shape in options.shapes:
        for threads in options.threads:
            done = options.rounds, options.tokens, options.formats
            for rows in measure(options.models, shape, threads, *done):
                about = {"shared_machine": machine.shared(threads), **machine.describe()}
                fresh = [{**row, **about} for row in rows]
                stored = results.renewed(results.load("cpu_decode"), fresh, *KEY)
                results.store("cpu_decode", stored)


if __name__ == "__main__":
    main()
