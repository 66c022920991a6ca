"""What vLLM does around a model, on quantised ones: LoRA, speculation, caching, expert parallelism.

`python benchmarks/vllm_features.py [--minutes 4] [--only WORD]` measures what
results/vllm_features.json lacks, feature by feature, with the judge of vllm_matrix.py. "counters"
are vLLM's own and show that a feature was at work.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import machine
import vllm
from vllm_matrix import MAX_TOKENS, PROMPTS, TIES, shortfall

from pvrt.format.atomic import as_json, write_synced
from tests.fixtures.published import write_published
from tests.fixtures.toy import write_toy
from tests.fixtures.vllm_extras import quantise_ends, write_adapter
from tests.fixtures.vllm_generate import Job, each_result

RESULTS = machine.ROOT / "benchmarks" / "results" / "vllm_features.json"
LONG = [[256, *range(100, 180)], [256, *range(100, 170), 5, 6, 7]]
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}


@dataclass(frozen=True)
class Feature:
    """A feature on one layout; `write` makes the checkpoint and returns its judge."""

    name: str
    layout: str = "llama-2"
    engine: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    long: bool = False
    adapter: tuple[str, ...] = ()
    write: Callable[[Path, str], Any] | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies a row."""
        return self.name, self.layout, self.ranks, not self.engine.get("enforce_eager", True)


def ends(path: Path, layout: str) -> Any:
    """Embeddings and lm_head in codes."""
    model = write_toy(path, layout)
    quantise_ends(path, model, "2x8g8")
    return model


def short(path: Path, layout: str) -> Any:
    """A list of dense weights that names lm_head and routers alone."""
    return write_published(path, layout, "2x8g8", short_list=True)


def features() -> list[Feature]:
    """All of them."""
    lora = {"enable_lora": True, "max_lora_rank": 8}
    attention = {**lora, "lora_target_modules": ATTENTION}
    compiled = {"enforce_eager": False}
    cache = {"enable_prefix_caching": True, "block_size": 32}
    cached = Feature("prefix caching", engine=cache, long=True)
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 32, "max_num_seqs": 4}
    chunked = Feature("chunked prefill", engine=chunks, long=True)
    guessed = Feature("n-gram speculation", engine={"speculative_config": NGRAM}, long=True)
    drafted = Feature("draft model", engine={"speculative_config": {"method": "draft_model"}})
    adapted = Feature("LoRA", engine=lora, adapter=ADAPTED)
    in_codes = Feature("lm_head and embeddings in codes", "llama", write=ends)
    listed = Feature("short skip list", "llama-3.2", write=short)
    parallel = Feature("expert parallel", "mixtral", {"enable_expert_parallel": True}, ranks=2)
    here = [
        *(cached, chunked, guessed, drafted, adapted, in_codes, listed, parallel),
        replace(parallel, layout="qwen2-moe"),
        *(replace(feature, layout="mixtral") for feature in (cached, chunked, guessed, listed)),
        Feature("LoRA on attention", "mixtral", attention, adapter=tuple(ATTENTION)),
        replace(in_codes, layout="llama-tied"),
        Feature("modelling code of transformers", engine={"model_impl": "transformers"}),
        *(replace(feature, ranks=2) for feature in (adapted, in_codes, guessed)),
    ]
    return here + [
        replace(feature, engine={**feature.engine, **compiled})
        for feature in (guessed, adapted, in_codes)
    ]


def prepare(feature: Feature, folder: Path) -> tuple[Job, Any]:
    """Write the checkpoint; the job for vLLM and the dense judge."""
    if feature.write is not None:
        judge = feature.write(folder, feature.layout)
    else:
        judge = write_published(folder, feature.layout, "2x8g8")
    engine = {**feature.engine, "tensor_parallel_size": feature.ranks}
    if feature.name == "draft model":
        write_published(folder / "draft", "llama-3.1", "1x16g8")
        engine["speculative_config"] = {
            **engine["speculative_config"],
            "model": str(folder / "draft"),
            "num_speculative_tokens": 2,
        }
    lora = None
    if feature.adapter:
        lora = str(folder / "adapter")
        write_adapter(folder / "adapter", judge, feature.adapter)
    prompts = LONG if feature.long else None
    job = Job(str(folder), engine=engine, prompts=prompts, rounds=1 + feature.long, lora=lora)
    return job, judge


def measure(wanted: list[Feature], folder: Path, end: float) -> None:
    """Run features of equally many ranks in one process and store a row for each."""
    prepared = [prepare(feature, folder / str(n)) for n, feature in enumerate(wanted)]
    jobs = [job for job, _ in prepared]
    answers = each_result(jobs, PROMPTS, max_tokens=MAX_TOKENS, ranks=wanted[0].ranks)
    for feature, (job, judge), answer in zip(wanted, prepared, answers, strict=True):
        name, layout, ranks, compiled = feature.key
        row: dict[str, Any] = {
            "feature": name,
            "architecture": layout,
            "tensor_parallel": ranks,
            "compiled": compiled,
            "vllm": answer["vllm"].partition("+")[0],
            "equal": False,
        }
        if "tokens" in answer:
            pairs = zip(job.prompts or PROMPTS, answer["tokens"], strict=True)
            lacking = max(shortfall(judge, list(prompt), tokens) for prompt, tokens in pairs)
            row |= {"equal": lacking <= TIES["float32"], "shortfall": round(lacking, 6)}
            row["counters"] = answer["counters"]
        else:
            row["error"] = answer["error"]
        print(json.dumps(row), flush=True)
        known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
        write_synced(RESULTS, as_json([*known, row]))
        if time.monotonic() > end:
            return


def main() -> None:
    """Measure what is missing, until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--only", default="", help="features whose name has this word")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    names = ("feature", "architecture", "tensor_parallel", "compiled", "vllm")
    have = {tuple(row[name] for name in names) for row in known}
    here = vllm.__version__.partition("+")[0]
    missing = [feature for feature in features() if (*feature.key, here) not in have]
    missing = [feature for feature in missing if arguments.only in feature.name]
    print(f"{len(missing)} features to measure on vLLM {here}", flush=True)
    while missing and time.monotonic() < end:
        alike = [feature for feature in missing if feature.ranks == missing[0].ranks][:8]
        # vLLM starts no other engine where numba was loaded for n-grams (docs/vllm.md).
        first_guess = next((n for n, f in enumerate(alike) if "n-gram" in f.name), len(alike))
        batch = alike[: first_guess + 1]
        with TemporaryDirectory() as folder:
            measure(batch, Path(folder), end)
        missing = [feature for feature in missing if feature not in batch]


if __name__ == "__main__":
    main()
