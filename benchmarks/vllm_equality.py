"""Greedy tokens of the vLLM engine against the dense model that a checkpoint stands for.

    python benchmarks/vllm_equality.py matrix [--minutes 4] [--only WORD] [--note TEXT]
    python benchmarks/vllm_equality.py features [--minutes 4] [--only WORD]

`matrix` is layouts x schemes x types x ranks: results/vllm_matrix.json. The ranks are of tensor
parallelism; vLLM's CPU platform does not generate with pipeline stages (docs/vllm.md). `features`
is what vLLM does around a model (LoRA, speculation, caching, expert parallelism):
results/vllm_features.json, with vLLM's own counters, which show that a feature was at work. A run
measures what the file lacks for the installed vLLM, row by row, and can be stopped at any time.
--note says how that vLLM was put together, where no package of it runs here.

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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import machine
import results
import torch
import vllm

sys.path.insert(0, str(machine.ROOT))
from tests.fixtures.published import LAYOUTS, write_published
from tests.fixtures.vllm_extras import write_adapter
from tests.fixtures.vllm_generate import Job, each_result

PROMPTS = [[256, 10, 20, 30], list(range(256, 40, -7)), [256, 99]]
LONG = [[256, *range(100, 180)], [256, *range(100, 170), 5, 6, 7]]
MAX_TOKENS = 24
TIES = {"float32": 1e-3, "float16": 0.25, "bfloat16": 0.25}
BATCH = 12  # jobs of one process
HERE = vllm.__version__.partition("+")[0]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DRAFT = ("llama-3.1", "1x16g8")
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}


@dataclass(frozen=True)
class Case:
    """One checkpoint on one engine; `feature` is empty in the matrix.

    engine: further arguments of vllm.LLM. long: prompts that share a beginning, answered twice.
    adapter: the linears of a LoRA. write: makes the checkpoint and returns its judge.
    """

    layout: str = "llama-2"
    scheme: str = "2x8g8"
    dtype: str = "float32"
    tensor_parallel: int = 1
    compiled: bool = False
    feature: str = ""
    engine: dict[str, Any] = field(default_factory=dict)
    long: bool = False
    adapter: tuple[str, ...] = ()
    write: Callable[[Path, str], Any] | None = None

    @property
    def key(self) -> dict[str, Any]:
        """What identifies its row."""
        place = {"architecture": self.layout, "tensor_parallel": self.tensor_parallel}
        if self.feature:
            kind: dict[str, Any] = {"feature": self.feature}
        else:
            kind = {"scheme": self.scheme, "dtype": self.dtype}
        return {**place, **kind, "compiled": self.compiled, "vllm": HERE}

    def prepare(self, folder: Path) -> tuple[Job, Any]:
        """Write the checkpoint; the job for vLLM and the dense judge."""
        if self.write is not None:
            judge = self.write(folder, self.layout)
        else:
            judge = write_published(folder, self.layout, self.scheme)
        engine = {
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel,
            "enforce_eager": not self.compiled,
            **self.engine,
        }
        if "draft model" in self.feature:
            draft = folder / "draft"
            if self.write is not None:
                self.write(draft, DRAFT[0])
            else:
                write_published(draft, *DRAFT)
            engine["speculative_config"] = {
                "method": "draft_model",
                "model": str(draft),
                "num_speculative_tokens": 2,
            }
        lora = None
        if self.adapter:
            lora = str(folder / "adapter")
            write_adapter(folder / "adapter", judge, self.adapter)
        prompts = LONG if self.long else None
        return Job(str(folder), None, engine, prompts, 1 + self.long, lora), judge


def matrix() -> list[Case]:
    """Layouts, schemes, types and ranks, the most telling first."""
    every = [Case(layout) for layout in LAYOUTS]
    both = [*every, *(replace(case, scheme="1x16g8") for case in every)]
    others = [Case("llama-2", scheme) for scheme in ("1x16g16", "1x8g8", "8x8g32", "2x16g8")]
    others += [Case(layout, "1x16g16") for layout in ("llama-3.1", "phi-3", "qwen2")]
    others += [Case(layout, "2x8g8o4") for layout in ("llama-2", "mixtral")]
    two = [replace(case, tensor_parallel=2) for case in every]
    compiled = [replace(case, compiled=True) for case in every]
    whole = ("llama-3.2", "mixtral", "gemma-2", "phi-3", "command-r")
    return [
        *both,
        *(replace(case, dtype="bfloat16") for case in both),
        *(*two, *compiled, *others),
        # vLLM refuses every Gemma 2 in float16
        *(replace(case, dtype="float16") for case in every if case.layout != "gemma-2"),
        *(replace(case, dtype="bfloat16") for case in two),
        *(replace(case, scheme="1x16g8") for case in two),
        *(replace(case, dtype="bfloat16") for case in compiled),
        *(replace(case, tensor_parallel=2) for case in compiled if case.layout in whole),
    ]


def mixed(path: Path, layout: str) -> Any:
    """A scheme for each kind of layer, embeddings and lm_head in codes."""
    # Names end so: qkv_proj has the scheme of v_proj, and gate_up_proj that of up_proj.
    schemes = {"q_proj": "3x8g8", "v_proj": "4x8g8", "up_proj": "2x8g4", "down_proj": "1x16g8"}
    if layout in ("mixtral", "qwen2-moe"):  # vLLM wants one scheme for gate and up of experts
        schemes |= {"up_proj": "2x8g8", ".w2": "3x8g8"}
    schemes |= {"embed_tokens": "2x8g4", "lm_head": "3x8g4"}
    return write_published(path, layout, "2x8g8", schemes=schemes)


def short(path: Path, layout: str) -> Any:
    """A list of dense weights that names lm_head and routers alone."""
    return write_published(path, layout, "2x8g8", short_list=True)


def features() -> list[Case]:
    """What vLLM does around a model."""
    lora = {"enable_lora": True, "max_lora_rank": 8}
    cache = {"enable_prefix_caching": True, "block_size": 32}
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 32, "max_num_seqs": 4}
    cached = Case(feature="prefix caching", engine=cache, long=True)
    chunked = Case(feature="chunked prefill", engine=chunks, long=True)
    guessed = Case(feature="n-gram speculation", engine={"speculative_config": NGRAM}, long=True)
    mlp = ("gate_proj", "up_proj", "down_proj")
    adapted = Case(feature="LoRA", engine=lora, adapter=(*ATTENTION, *mlp))
    in_codes = Case("llama-2", feature="mixed schemes, embeddings in codes", write=mixed)
    listed = Case("llama-3.2", feature="short skip list", write=short)
    parallel = Case("mixtral", tensor_parallel=2, feature="expert parallel")
    parallel = replace(parallel, engine={"enable_expert_parallel": True})
    attention = {**lora, "lora_target_modules": list(ATTENTION)}
    transformers = {"model_impl": "transformers"}
    return [
        *(cached, chunked, guessed, Case(feature="draft model"), adapted, in_codes, listed),
        *(parallel, replace(parallel, layout="qwen2-moe")),
        *(replace(case, layout="mixtral") for case in (cached, chunked, guessed, listed)),
        Case("mixtral", feature="LoRA on attention", engine=attention, adapter=ATTENTION),
        *(replace(in_codes, layout=layout) for layout in LAYOUTS if layout != "llama-2"),
        Case(feature="mixed schemes, draft model", write=mixed),
        replace(adapted, feature="mixed schemes, LoRA", write=mixed),
        Case(feature="modelling code of transformers", engine=transformers),
        Case(feature="mixed schemes, code of transformers", engine=transformers, write=mixed),
        *(replace(case, tensor_parallel=2) for case in (adapted, in_codes, guessed)),
        *(replace(case, compiled=True) for case in (guessed, adapted, in_codes)),
    ]


def shortfall(model: Any, prompt: list[int], answer: list[int]) -> float:
    """How far chosen tokens are from the best, in standard deviations of the logits."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return float(((logits.amax(1) - chosen) / logits.std(1)).max())


def next_batch(missing: list[Case]) -> list[Case]:
    """Cases of the same ranks, which one process of vLLM runs one after the other."""
    ranks = missing[0].tensor_parallel
    alike = [case for case in missing if case.tensor_parallel == ranks][:BATCH]
    # vLLM starts no other engine where numba was loaded for n-grams (docs/vllm.md).
    last = next((n for n, case in enumerate(alike) if "n-gram" in case.feature), len(alike))
    return alike[: last + 1]


def measure(cases: list[Case], folder: Path, name: str, note: dict[str, str]) -> None:
    """Run cases of the same ranks in one process and store a row for each."""
    prepared = [case.prepare(folder / str(number)) for number, case in enumerate(cases)]
    jobs = [job for job, _ in prepared]
    answers = each_result(jobs, PROMPTS, max_tokens=MAX_TOKENS, ranks=cases[0].tensor_parallel)
    for case, (job, judge), answer in zip(cases, prepared, answers, strict=True):
        row: dict[str, Any] = {**case.key, "equal": False, **note}
        if "tokens" in answer:
            pairs = zip(job.prompts or PROMPTS, answer["tokens"], strict=True)
            lacking = max(shortfall(judge, list(prompt), tokens) for prompt, tokens in pairs)
            row |= {"equal": lacking <= TIES[case.dtype], "shortfall": round(lacking, 6)}
            row |= {"counters": answer["counters"]} if case.feature else {}
        else:
            row["error"] = answer["error"]
        print(json.dumps(row), flush=True)
        results.store(name, results.renewed(results.load(name), [row], *case.key))


def main() -> None:
    """Measure what is missing, until the time is up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=("matrix", "features"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--only", default="", help="features or layouts with this word")
    parser.add_argument("--failed", action="store_true", help="measure unequal rows again")
    parser.add_argument("--note")
    options = parser.parse_args()
    end, name = time.monotonic() + 60 * options.minutes, f"vllm_{options.part}"
    wanted = matrix() if options.part == "matrix" else features()
    known = [row for row in results.load(name) if row["equal"] or not options.failed]
    missing = [
        case
        for case in wanted
        if options.only in (case.feature or case.layout)
        and not any(case.key.items() <= row.items() for row in known)
    ]
    print(f"{len(missing)} of {len(wanted)} rows to measure on vLLM {HERE}", flush=True)
    while missing and time.monotonic() < end:
        batch = next_batch(missing)
        with TemporaryDirectory() as folder:
            measure(batch, Path(folder), name, {"note": options.note} if options.note else {})
        missing = [case for case in missing if case not in batch]


if __name__ == "__main__":
    main()
