"""The embedded engine on a device that is not the CPU."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from pvrt.kv_cache import cache_shape
from pvrt_server import capacity
from pvrt_server.engine.engine import Engine
from pvrt_server.engine.sampling import SamplingParams
from pvrt_server.engine.sequences import TokenEvent
from pvrt_server.options import ServeOptions
from tests.fixtures.c_library import without_c_library
from tests.fixtures.simulated_device import NAME, TOTAL_BYTES
from tests.fixtures.toy import write_toy

GREEDY = SamplingParams(temperature=0, max_tokens=12)
DRAWN = SamplingParams(
    temperature=0.9,
    max_tokens=12,
    seed=5,
    top_p=0.9,
    min_p=0.01,
    presence_penalty=0.5,
    repetition_penalty=1.1,
    logit_bias={65: 1.0},
    logprobs=3,
    prompt_logprobs=2,
)


def answers(engine: Engine, params: SamplingParams) -> list[int]:
    events = list(engine.generate([72, 101, 108, 108, 111], params))
    return [event.token_id for event in events if isinstance(event, TokenEvent)]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_answers_are_those_of_the_cpu(
    architecture: str, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_toy(tmp_path / "toy", architecture)
    shape = cache_shape(AutoConfig.from_pretrained(tmp_path / "toy"), itemsize=4)
    options = ServeOptions(dtype="float32")
    # Without the C library, whose kernels round otherwise: drawn tokens could differ by that.
    with without_c_library(), Engine.load(tmp_path / "toy", options) as engine:
        ours = [answers(engine, params) for params in (GREEDY, DRAWN)]
    monkeypatch.setattr(capacity, "default_device", lambda: device)
    with Engine.load(tmp_path / "toy", options) as engine:
        assert engine.device == NAME
        cache = engine._runtime.cache_tokens * shape.bytes_for(1)
        assert cache < TOTAL_BYTES  # of the device's memory, not the host's
        theirs = [answers(engine, params) for params in (GREEDY, DRAWN)]
    assert theirs == ours
