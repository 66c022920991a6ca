"""Tokens per second of the embedded engine with CUDA graphs and without, for gpu_product.py."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from gpu_item import Item

PROMPTS = [list(range(60 + start, 92 + start)) for start in range(4)]
_CAPTURED = "pvrt_server.engine.loading.CapturedModel"


def decode_rates(item: Item, folder: Path, dtype: str) -> None:
    """The same greedy answers, of one sequence and of four at once, both ways; and a replay."""
    from pvrt_server.engine.engine import Engine
    from pvrt_server.engine.models import TransformersModel
    from pvrt_server.options import ServeOptions

    options = ServeOptions.model_validate({"dtype": dtype, "prefix_reuse": False})
    found: dict[str, list[list[int]]] = {}
    for way in ("eager", "captured"):
        with item.check(f"decoding, {way}"):
            plain = patch(_CAPTURED, lambda model, *_: TransformersModel(model))
            with plain if way == "eager" else nullcontext():
                running = Engine.load(folder, options)
            with running:
                count = item.some(64, 4)
                for several in (PROMPTS[:1], PROMPTS[:2], PROMPTS):  # records, compiles
                    _answers(running, several, item.some(16, 2))
                one, alone = _answers(running, PROMPTS[:1], count)
                four, together = _answers(running, PROMPTS, count)
                found[way] = alone + together
                item.note(tokens_per_second={way: {"one": one, "four": four}})
                if way == "captured" and not item.dry:
                    model: Any = running._runtime.model
                    assert {(1, 256), (4, 256)} <= set(model._graphs), model._graphs
                    with torch.inference_mode():
                        item.note(replay=_replay(model._graphs[1, 256]._replay))
    with item.check("the same tokens"):
        pairs = list(zip(found["eager"], found["captured"], strict=True))
        same = [_shared(*pair) for pair in pairs]
        item.note(same_tokens=same, of_tokens=[len(ours) for ours, _ in pairs])
        assert min(same) >= 4, same  # rounding may part them later


def _answers(running: Any, prompts: list[list[int]], count: int) -> tuple[float, list[list[int]]]:
    """Tokens per second after the first of all, and the answers."""
    from pvrt_server.engine.sampling import SamplingParams
    from pvrt_server.engine.sequences import TokenEvent

    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)

    def answer(prompt: list[int]) -> list[tuple[float, int]]:
        events = running.generate(prompt, params)
        return [(time.monotonic(), e.token_id) for e in events if isinstance(e, TokenEvent)]

    with ThreadPoolExecutor(len(prompts)) as pool:
        rows = list(pool.map(answer, prompts))
    began = max(row[0][0] for row in rows)
    stamps = [stamp for row in rows for stamp, _ in row if stamp > began]
    return len(stamps) / (max(stamps) - began), [[token for _, token in row] for row in rows]


def _shared(first: list[int], second: list[int]) -> int:
    differ = [ours != theirs for ours, theirs in zip(first, second, strict=True)]
    return differ.index(True) if True in differ else len(differ)


def _replay(replay: Any) -> dict[str, Any]:
    """Microseconds of a replay on the GPU, and of its kernels by name, the longest first."""
    timed: Any = torch.cuda.Event
    times = []
    for _ in range(20):
        begin, end = timed(enable_timing=True), timed(enable_timing=True)
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    with _profiled() as profile:
        for _ in range(4):
            replay()
        torch.cuda.synchronize()
    rows = sorted(profile.key_averages(), key=lambda row: -row.device_time_total)
    kernels = {row.key[:90]: [row.count / 4, row.device_time_total / 4] for row in rows[:24]}
    return {"microseconds": median(times), "count_and_microseconds": kernels}


@contextmanager
def _profiled() -> Iterator[Any]:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        yield profile
