"""Does vLLM answer like the dense model? Published layouts x schemes x types x ranks x compilation.

`python benchmarks/vllm_matrix.py [--minutes 4] [--part NAME]` measures what
results/vllm_matrix.json lacks for the installed vLLM, row by row, and can be stopped at any time.
With --note rows say how that vLLM was put together, where no package of it runs here.

Checkpoints are random and of toy size, in exactly the published layouts (tests/fixtures). The judge
is the dense model in transformers, in float32: each token that vLLM chose is compared with the
logits after those before it. "shortfall" is the largest distance to the highest logit, in standard
deviations of the logits; equal means at most 0.001 in float32 (a tie, decided by the order of sums)
and 0.25 in 16 bits (a random token lacks about 3).
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import machine
import torch
import vllm

from pvrt.format.atomic import as_json, write_synced

sys.path.insert(0, str(machine.ROOT))
from tests.fixtures.published import LAYOUTS, write_published
from tests.fixtures.vllm_generate import Job, each_result

RESULTS = machine.ROOT / "benchmarks" / "results" / "vllm_matrix.json"
PROMPTS = [[256, 10, 20, 30], list(range(256, 40, -7)), [256, 99]]
MAX_TOKENS = 24
TIES = {"float32": 1e-3, "float16": 0.25, "bfloat16": 0.25}
BATCH = 12  # jobs of one process


@dataclass(frozen=True)
class Cell:
    """One entry of the matrix."""

    architecture: str
    scheme: str = "2x8g8"
    dtype: str = "float32"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    compiled: bool = False

    @property
    def ranks(self) -> int:
        """Processes that it takes."""
        return self.tensor_parallel * self.pipeline_parallel

    def engine(self) -> dict[str, Any]:
        """Arguments of vllm.LLM."""
        return {
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel,
            "pipeline_parallel_size": self.pipeline_parallel,
            "enforce_eager": not self.compiled,
        }


def parts() -> dict[str, list[Cell]]:
    """The matrix by parts, the most telling first."""
    every = [Cell(architecture) for architecture in LAYOUTS]
    both = [*every, *(replace(cell, scheme="1x16g8") for cell in every)]
    others = [Cell("llama-2", scheme) for scheme in ("1x16g16", "1x8g8", "8x8g32", "2x16g8")]
    others += [Cell(architecture, "1x16g16") for architecture in ("llama-3.1", "phi-3", "qwen2")]
    two = [replace(cell, tensor_parallel=2) for cell in every]
    compiled = [replace(cell, compiled=True) for cell in every]
    return {
        "eager": both,
        "bfloat16": [replace(cell, dtype="bfloat16") for cell in both],
        "ranks": two,
        "compiled": compiled,
        "schemes": [*others, Cell("llama-2", "2x8g8o4"), Cell("mixtral", "2x8g8o4")],
        "float16": [
            replace(cell, dtype="float16")
            for cell in every
            if cell.architecture != "gemma-2"  # vLLM refuses every such model in float16
        ],
        "ranks-16-bit": [replace(cell, dtype="bfloat16") for cell in two]
        + [replace(cell, scheme="1x16g8") for cell in two],
        "pipeline": [replace(cell, pipeline_parallel=2) for cell in every],
        "compiled-bfloat16": [replace(cell, dtype="bfloat16") for cell in compiled],
        "compiled-ranks": [
            replace(cell, tensor_parallel=2)
            for cell in compiled
            if cell.architecture in ("llama-3.2", "mixtral", "gemma-2", "phi-3", "command-r")
        ],
    }


def shortfall(model: Any, prompt: list[int], answer: list[int]) -> float:
    """How far chosen tokens are from the best, in standard deviations of the logits."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return float(((logits.amax(1) - chosen) / logits.std(1)).max())


def rows(cells: list[Cell], folder: Path, judges: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure cells in one process of vLLM."""
    jobs = []
    for cell in cells:
        name = f"{cell.architecture} {cell.scheme}"
        if name not in judges:
            judges[name] = write_published(folder / name, cell.architecture, cell.scheme)
        jobs.append(Job(str(folder / name), engine=cell.engine()))
    ranks = max(cell.ranks for cell in cells)
    answers = each_result(jobs, PROMPTS, max_tokens=MAX_TOKENS, ranks=ranks)
    for cell, answer in zip(cells, answers, strict=True):
        numbered = answer["vllm"].partition("+")[0]
        row: dict[str, Any] = {**vars(cell), "vllm": numbered, "equal": False}
        if "tokens" in answer:
            judge = judges[f"{cell.architecture} {cell.scheme}"]
            pairs = zip(PROMPTS, answer["tokens"], strict=True)
            lacking = max(shortfall(judge, *pair) for pair in pairs)
            row |= {"equal": lacking <= TIES[cell.dtype], "shortfall": round(lacking, 6)}
        else:
            row["error"] = answer["error"]
        yield row


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What identifies a row."""
    return (*(row[name] for name in Cell.__dataclass_fields__), row["vllm"])


def main() -> None:
    """Measure what is missing, until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--part", action="append", choices=list(parts()))
    parser.add_argument("--failed", action="store_true", help="measure unequal rows again")
    parser.add_argument("--note")
    arguments = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    if arguments.failed:
        known = [row for row in known if row["equal"]]
    have, here = {key(row) for row in known}, vllm.__version__.partition("+")[0]
    wanted = [cell for name in arguments.part or parts() for cell in parts()[name]]
    missing = [cell for cell in dict.fromkeys(wanted) if (*vars(cell).values(), here) not in have]
    end, judges = time.monotonic() + 60 * arguments.minutes, {}  # type: ignore[var-annotated]
    print(f"{len(missing)} of {len(wanted)} rows to measure on vLLM {here}", flush=True)
    with TemporaryDirectory() as folder:
        while missing and time.monotonic() < end:
            first = missing[0]
            batch = [cell for cell in missing if cell.ranks == first.ranks][:BATCH]
            for row in rows(batch, Path(folder), judges):
                row |= {"note": arguments.note} if arguments.note else {}
                print(json.dumps(row), flush=True)
                known = [*json.loads(RESULTS.read_text()), row] if RESULTS.is_file() else [row]
                write_synced(RESULTS, as_json(known))
                if time.monotonic() > end:
                    return
            missing = [cell for cell in missing if cell not in batch]


if __name__ == "__main__":
    main()
