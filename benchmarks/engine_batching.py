"""Continuous batching on the CPU, ours against transformers' own: results/engine_batching.json.

    python benchmarks/engine_batching.py MODEL

One checkpoint, packed the same way for both, one process. For every number of requests at once all
of them ask for 32 greedy tokens after their own prompt of 64. Tokens per second of wall time, the
best of two; prompts differ in every round, so that no prefix is known.
"""

import argparse
import json
import random
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import machine
import torch

import pvrt
from pvrt.modules.aqlm_linear import pack_model
from pvrt_server.engine.engine import Engine
from pvrt_server.engine.sampling import SamplingParams
from pvrt_server.engine.sequences import GenerationRequest, PromptEvent
from pvrt_server.options import ServeOptions

RESULT = machine.ROOT / "benchmarks" / "results" / "engine_batching.json"
PROMPT, ANSWER, ROUNDS = 64, 32, 2
REQUESTS = (1, 4, 16)


class Ours:
    """The embedded engine without HTTP."""

    def __init__(self, folder: Path) -> None:
        self._engine = Engine.load(folder, ServeOptions(max_num_seqs=max(REQUESTS)))
        self._params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)

    def run(self, prompts: list[list[int]]) -> None:
        """Answer all prompts at once."""
        events: SimpleQueue[Any] = SimpleQueue()
        for prompt in prompts:
            request = GenerationRequest(tuple(prompt), self._params)
            self._engine.submit([request], events.put)
        left = len(prompts)
        while left:
            event = events.get()
            left -= not isinstance(event, PromptEvent) and event.finish_reason is not None

    def close(self) -> None:
        """Stop it."""
        self._engine.close()


class Transformers:
    """generate_batch of transformers over the same packed layers."""

    def __init__(self, folder: Path) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        model: Any = pvrt.load(folder, dtype=torch.float32)
        pack_model(model, model.dtype)
        model.set_attn_implementation("sdpa")
        self._model = model
        self._batching = ContinuousBatchingConfig(
            num_blocks=64, max_batch_tokens=512, allow_block_sharing=False
        )
        self._generation = GenerationConfig(
            max_new_tokens=ANSWER, do_sample=False, eos_token_id=-1, pad_token_id=0
        )

    def run(self, prompts: list[list[int]]) -> None:
        """Answer all prompts at once."""
        answers = self._model.generate_batch(
            prompts,
            generation_config=self._generation,
            continuous_batching_config=self._batching,
            persistent_manager=True,
            warmup=False,
        )
        lengths = [len(answer.generated_tokens) for answer in answers.values()]
        assert lengths == [ANSWER] * len(prompts), lengths

    def close(self) -> None:
        """It has no thread of its own between runs."""


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    generator = random.Random(0)
    engines: dict[str, Any] = {"pvrt": Ours(options.model)}
    engines["transformers, generate_batch"] = Transformers(options.model)
    rows: list[dict[str, Any]] = []
    for number in REQUESTS:
        best: dict[str, float] = {}
        for _ in range(ROUNDS):
            prompts = [generator.choices(range(100, 20000), k=PROMPT) for _ in range(number)]
            for name, engine in engines.items():
                started = time.perf_counter()
                engine.run(prompts)
                rate = number * ANSWER / (time.perf_counter() - started)
                best[name] = max(rate, best.get(name, 0))
        rows += [
            {"server": name, "at_once": number, "tokens_per_second": round(rate, 2)}
            for name, rate in best.items()
        ]
        print(number, best, flush=True)
    for engine in engines.values():
        engine.close()
    result = {
        **machine.describe(),
        "model": options.model.resolve().name,
        "threads": torch.get_num_threads(),
        "note": "wall time on a machine that others used as well",
        "prompt_tokens": PROMPT,
        "answer_tokens": ANSWER,
        "throughput": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
