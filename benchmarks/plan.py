"""Predicted against measured memory and time of tuning runs: `python benchmarks/plan.py`.

Every run is a process of its own, whose resident anonymous and shared memory (RssAnon + RssShmem of
/proc/self/status) a thread samples every 3 ms while the stages of `tune` report where they are.
Pages of mapped model files are not in it: the kernel takes them back when memory is short, and the
plan does not count them either. The work is the least that passes every stage; memory does not
depend on how long layers are fitted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import data
import machine
import memory
import quickstart
import results

from pvrt_tune.machine import Machine, release_memory
from pvrt_tune.settings import FinetuneSettings, FitSettings, Recipe, TrainSettings, TuneJob

LEAST = Recipe(
    scheme="2x4g8",
    samples=8,
    length=512,
    fit=FitSettings(rounds=1, kmeans_iterations=1, cg_iterations=1),
    finetune=FinetuneSettings(epochs=1),
)
#: By name, for the command line of the child process.
RECIPES = {
    "calibration": LEAST,
    "short windows": replace(LEAST, length=64),
    "PV-Tuning": replace(
        LEAST,
        training=TrainSettings(
            windows=8, steps=2, batch=4, microbatch=2, held_out=4, evaluate_every=2
        ),
    ),
}
#: Functions of a stage: module, name, phase of the plan.
STAGES = (
    ("pvrt_tune.pipeline", "_sampled", "sampling"),
    ("pvrt_tune.pipeline", "calibrate", "block pass"),
    ("pvrt_tune.calibrate.stage", "quantize_linear", "layer fit"),
    ("pvrt_tune.calibrate.stage", "finetune_block", "block fine-tune"),
    ("pvrt_tune.calibrate.stage", "quantize_ends", "embedding fit"),
    ("pvrt_tune.pipeline", "pv_tune", "PV-Tuning"),
    ("pvrt_tune.pipeline", "write", "write"),
)


class Sampler(memory.Watch):
    """Peak memory and time by stage of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)

    def around(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            outer, self.phase = self.phase, phase
            started = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.monotonic() - started
                self.seconds[phase] += spent
                self.seconds[outer] -= spent
                self.look()
                release_memory()  # what the stage leaves is not the next one's
                self.phase = outer

        return timed


class Enough(Exception):
    """The blocks of a model are alike: the first shows the peaks of all."""


def stop_early(line: str) -> None:
    """Progress of a run with many blocks ends with the first of them."""
    print(line, file=sys.stderr)
    if line.startswith("block 1/") and len(line.split()[1]) > len("1/2"):
        raise Enough


def measured(model: str, recipe: Recipe, text: str | None) -> dict[str, Any]:
    """Tune a model in this process; peaks, times and the plan by phase."""
    from pvrt_tune import pipeline
    from pvrt_tune.plan.memory_plan import Plan
    from pvrt_tune.plan.on_machine import plan_job

    sampler = Sampler()
    for place, name, phase in STAGES:
        module = import_module(place)
        setattr(module, name, sampler.around(getattr(module, name), phase))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        job = TuneJob(model, out, recipe, text)
        plan: Plan = plan_job(job, Machine.here("cpu", out))
        sampler.start()
        with suppress(Enough):
            pipeline.tune(job, stop_early)
    predicted = {phase.name: asdict(phase) for phase in plan.phases}
    peak = {phase: sizes["anonymous"] for phase, sizes in sampler.peak.items()}
    return {"predicted": predicted, "peak": peak, "seconds": sampler.seconds}


def synthetic(folder: Path, hidden: int, inner: int, vocabulary: int, layers: int) -> Path:
    """A random Llama in bfloat16 shards, with a tokenizer of its vocabulary's size."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=inner,
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="400MB")
    tokenizer(vocabulary).save_pretrained(folder)
    return folder


def tokenizer(size: int) -> Any:
    """Byte-pair encoding with one merge for each of `size` entries beyond the bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<s>", "</s>"])}
    merges: list[tuple[str, str]] = []
    left = iter([*alphabet, *(a + b for a in alphabet for b in alphabet)])
    while len(vocabulary) < size:
        first = next(left)
        for second in alphabet[: size - len(vocabulary)]:
            vocabulary[first + second] = len(vocabulary)
            merges.append((first, second))
    pairs = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, bos_token="<s>", eos_token="</s>")


def main() -> None:
    """Run all models, print a table and store the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "RECIPE", "DATA"))
    parser.add_argument("--only", help="run one model, by name")
    asked = parser.parse_args()
    if asked.child:
        model, recipe, given_text = asked.child
        print(json.dumps(measured(model, RECIPES[recipe], given_text or None)))
        return
    from pvrt.tools.perplexity import default_text

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(default_text())
        file = quickstart.smollm2()

        def llama(*sizes: int) -> Callable[[], Path]:
            return lambda: synthetic(Path(folder) / "x".join(map(str, sizes)), *sizes)

        # Model, recipe, and whether text is given.
        cases: dict[str, tuple[Callable[[], Path], str, bool]] = {
            "llama-toy": (llama(256, 512, 1000, 2), "calibration", False),
            "smollm2-135m (GGUF)": (lambda: file, "short windows", False),
            "smollm2-135m (GGUF), text given": (lambda: file, "calibration", True),
            "smollm2-135m (folder), text given": (
                lambda: data.as_folder(file, Path(folder) / "smollm2"),
                "calibration",
                True,
            ),
            "llama-0.3b": (llama(2048, 2048, 64000, 1), "short windows", False),
            "llama-0.6b, text given": (llama(2048, 4096, 128000, 1), "calibration", True),
            "llama-0.06b, PV-Tuning": (llama(1024, 2816, 8000, 4), "PV-Tuning", True),
        }
        for name, (make, recipe, given) in cases.items():
            if asked.only not in (None, name):
                continue
            done = subprocess.run(
                [sys.executable, __file__, "--child", make(), recipe, text if given else ""],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            fresh = compared(name, json.loads(done.stdout))
            results.store("plan", results.renewed(results.load("plan"), fresh, "model"))


def compared(model: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per phase."""
    rows = []
    for phase, predicted in found["predicted"].items():
        if phase not in found["peak"]:  # stopped before
            continue
        peak = found["peak"][phase]
        row = {
            "model": model,
            "phase": phase,
            "predicted_bytes": predicted["host_bytes"],
            "measured_bytes": peak,
            "ratio": predicted["host_bytes"] / peak,
            "predicted_seconds": predicted["seconds"],
            "measured_seconds": found["seconds"][phase],
            "load_average": os.getloadavg()[0],  # above the cores: times are of a shared machine
            **machine.describe(),
        }
        rows.append(row)
        print(
            f"{model:34} {phase:16} {row['predicted_bytes'] / 1e6:8.0f} MB predicted "
            f"{peak / 1e6:8.0f} measured  {row['ratio']:.2f}   {row['predicted_seconds']:6.1f} s "
            f"predicted {row['measured_seconds']:6.1f} measured",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
