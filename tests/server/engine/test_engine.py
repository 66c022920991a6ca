import json
import logging
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch

import pvrt
from pvrt.errors import CheckpointError, ServeError
from pvrt.modules.whole_model import quantized_layers
from pvrt_server.engine.engine import Engine, Event, FailureEvent
from pvrt_server.engine.sampling import SamplingParams
from pvrt_server.engine.sequences import GenerationRequest, PromptEvent, TokenEvent
from pvrt_server.errors import (
    BusyError,
    EngineStoppedError,
    GenerationError,
    RequestError,
)
from pvrt_server.options import ServeOptions
from tests.fixtures.toy import write_toy
from tests.server.running import PATIENCE, scripted_engine, wait_until

GREEDY = SamplingParams(temperature=0, max_tokens=24)


def tokens(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    events = engine.generate(prompt, params)
    return [event.token_id for event in events if isinstance(event, TokenEvent)]


def transformers_answer(folder: Path, prompt: list[int], number: int) -> list[int]:
    model = pvrt.load(folder, dense=True)
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=number, do_sample=False)
    ids: list[int] = answer[0, len(prompt) :].tolist()
    return ids


@pytest.mark.parametrize("architecture", ["llama-tied", "mistral", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("chunk", [512, 7])
def test_greedy_answers_are_those_of_transformers(
    tmp_path: Path, architecture: str, chunk: int
) -> None:
    write_toy(tmp_path, architecture)
    prompt = list(range(60, 120))  # longer than gemma's sliding window of 32
    with Engine.load(tmp_path, ServeOptions(prefill_chunk=chunk)) as engine:
        found = tokens(engine, prompt)
    assert found == transformers_answer(tmp_path, prompt, 24)


def test_a_device_without_a_kernel_decodes_once_and_says_so(
    toy: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pvrt.format.scheme.has_fast_kernel", lambda *scheme: False)
    with caplog.at_level(logging.INFO, "pvrt_server"), Engine.load(toy) as engine:
        tokens(engine, [1, 2])
    said = [r.message for r in caplog.records if "decoded once" in r.message]
    assert len(said) == 1
    assert "no 2x8g8 kernel for cpu" in said[0]


def test_layers_without_a_kernel_are_decoded_and_no_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_toy(tmp_path, schemes={"q_proj": "2x8g8o4"})
    prompt = list(range(60, 90))
    with caplog.at_level(logging.INFO, "pvrt_server"), Engine.load(tmp_path) as engine:
        model: Any = engine._runtime.model
        assert {str(layer.scheme) for layer in quantized_layers(model.model).values()} == {"2x8g8"}
        found = tokens(engine, prompt)
    assert found == transformers_answer(tmp_path, prompt, 24)
    (said,) = (r.message for r in caplog.records if "decoded once" in r.message)
    assert "no 2x8g8o4 kernel for cpu" in said


def test_dtype_is_float32_on_cpu_unless_asked(toy: Path, tmp_path: Path) -> None:
    write_toy(tmp_path, dtype=torch.bfloat16)
    for options, expected in (
        (ServeOptions(), torch.float32),
        (ServeOptions(dtype="bfloat16"), torch.bfloat16),
    ):
        with Engine.load(tmp_path, options) as engine:
            assert engine._runtime.model.dtype == expected


def test_the_models_generation_config_sets_the_defaults(tmp_path: Path) -> None:
    write_toy(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_k": 20, "eos_token_id": [257, 65]}'
    )
    with Engine.load(tmp_path) as engine:
        assert engine.defaults == SamplingParams(temperature=0.6, top_k=20)
        params = SamplingParams(temperature=0, logit_bias={65: 100.0})
        assert tokens(engine, [1, 2], params) == [65]


def test_prompt_scores_predict_each_token_from_those_before(toy: Path) -> None:
    prompt = list(range(70, 90))
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=3)
    with Engine.load(toy, ServeOptions(prefill_chunk=6)) as engine:
        (event,) = engine.generate(prompt, params)
    assert isinstance(event, PromptEvent)
    assert event.finish_reason == "length"
    model = pvrt.load(toy, dense=True)
    expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1).detach()
    assert event.logprobs[0] is None
    for place, entry in enumerate(event.logprobs[1:]):
        assert entry is not None
        assert entry.token_id == prompt[place + 1]
        assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=1e-4)
        assert entry.top[0][0] == int(expected[place].argmax())


def test_the_answer_ends_at_the_end_of_the_context(toy: Path) -> None:
    with Engine.load(toy, ServeOptions(max_model_len=40)) as engine:
        params = SamplingParams(temperature=0, ignore_eos=True)
        events = list(engine.generate(list(range(30)), params))
    assert len(events) == 11
    assert events[-1].finish_reason == "length"


def test_end_of_text_ends_the_answer_and_shows_nothing(toy: Path) -> None:
    engine, _ = scripted_engine(toy, "hi")
    with engine:
        events = list(engine.generate([1, 2], SamplingParams(temperature=0)))
        assert [event.text for event in events if isinstance(event, TokenEvent)] == ["h", "i", ""]
        assert events[-1].finish_reason == "stop"
        ignoring = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        assert len(tokens(engine, [1, 2], ignoring)) == 5


def test_jobs_begin_in_the_order_of_arrival(toy: Path) -> None:
    engine, model = scripted_engine(toy, "abc", max_sequences=2)
    model.gate.clear()
    order: list[int] = []
    done = threading.Event()

    def note(number: int, event: Event) -> None:
        if isinstance(event, PromptEvent):
            order.append(number)
        elif isinstance(event, TokenEvent) and event.finish_reason and number == 4:
            done.set()

    with engine:
        request = GenerationRequest((1, 2), GREEDY)
        for number in range(5):
            engine.submit([request], lambda event, number=number: note(number, event))  # type: ignore[misc]
        model.gate.set()
        assert done.wait(PATIENCE)
    assert order == [0, 1, 2, 3, 4]
    assert max(model.steps) == 2


def test_a_full_queue_refuses_with_a_waiting_time_and_recovers(toy: Path) -> None:
    engine, model = scripted_engine(toy, "abc", max_sequences=1, max_requests=3)
    model.gate.clear()
    request = GenerationRequest((1, 2), GREEDY)
    with engine:
        running = engine.submit([request], lambda event: None)
        wait_until(lambda: engine.running)
        waiting = [engine.submit([request], lambda event: None) for _ in range(2)]
        with pytest.raises(BusyError, match="3 requests run or wait") as caught:
            engine.submit([request], lambda event: None)
        assert caught.value.retry_after_seconds >= 1
        waiting[0].cancel()  # somebody who leaves makes room
        engine.submit([request], lambda event: None)
        model.gate.set()
        running.cancel()
        wait_until(lambda: not engine.waiting)
        assert len(tokens(engine, [1, 2])) == 4


def test_leaving_the_loop_cancels(toy: Path) -> None:
    engine, model = scripted_engine(toy, "x" * 400)
    model.hold_after = 5
    with engine:
        events = engine.generate([1, 2], SamplingParams(temperature=0))
        next(events)
        wait_until(lambda: not model.gate.is_set())
        events.close()
        model.gate.set()
        assert len(tokens(engine, [1, 2], SamplingParams(temperature=0, max_tokens=3))) == 3
        assert len(model.steps) <= 5 + 1 + 2  # the one under way, and those of the second answer


def test_closing_fails_what_runs_and_what_waits(toy: Path) -> None:
    engine, model = scripted_engine(toy, "x" * 400)
    model.gate.clear()
    events: SimpleQueue[Event] = SimpleQueue()
    for _ in range(2):
        engine.submit([GenerationRequest((1, 2), SamplingParams(temperature=0))], events.put)
    engine.stop(0)
    model.gate.set()
    engine.close()
    failures = [event for event in drain(events) if isinstance(event, FailureEvent)]
    assert len(failures) == 2
    with pytest.raises(EngineStoppedError, match="shutting down"):
        engine.submit([GenerationRequest((1, 2), GREEDY)], events.put)


def test_a_stop_with_grace_lets_short_answers_finish(toy: Path) -> None:
    engine, model = scripted_engine(toy, "abc")
    model.gate.clear()
    events: SimpleQueue[Event] = SimpleQueue()
    engine.submit([GenerationRequest((1, 2), GREEDY)], events.put)
    engine.stop(PATIENCE)
    model.gate.set()
    wait_until(lambda: events.qsize() == 5)
    engine.close()
    assert not any(isinstance(event, FailureEvent) for event in drain(events))


def test_running_out_of_memory_fails_one_answer_only(toy: Path) -> None:
    engine, model = scripted_engine(toy, [65, MemoryError("no memory")])
    with engine:
        with pytest.raises(GenerationError, match="no memory"):
            tokens(engine, [1, 2])
        model.script = [65]
        assert tokens(engine, [1, 2]) == [65, 257]
        assert engine.failure is None


def test_an_unknown_error_breaks_the_engine_for_good(toy: Path) -> None:
    engine, _ = scripted_engine(toy, [65, RuntimeError("device-side assert")])
    with engine:
        with pytest.raises(EngineStoppedError, match="device-side assert"):
            tokens(engine, [1, 2])
        assert engine.failure is not None
        with pytest.raises(EngineStoppedError, match="device-side assert"):
            tokens(engine, [1, 2])


def test_a_listener_that_raises_stops_its_job_only(toy: Path) -> None:
    engine, _ = scripted_engine(toy, "abc")

    def broken(event: Event) -> None:
        raise RuntimeError("event loop is closed")

    with engine:
        engine.submit([GenerationRequest((1, 2), GREEDY)], broken)
        assert len(tokens(engine, [1, 2])) == 4


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "prompt is empty"),
        ([1, 384], GREEDY, "token 384; this model has tokens 0 to 383"),
        ([1, -1], GREEDY, "token -1"),
        ([1], SamplingParams(logit_bias={999: 1.0}), "logit_bias holds token 999"),
        ([1] * 500, GREEDY, "512 tokens, but the prompt has 500 and max_tokens asks for 24"),
        ([1] * 512, SamplingParams(), "512 tokens, but the prompt has 512"),
    ],
)
def test_requests_that_cannot_run_are_refused_at_once(
    toy: Path, prompt: list[int], params: SamplingParams, message: str
) -> None:
    engine, _ = scripted_engine(toy, "abc")
    with engine, pytest.raises(RequestError, match=message):
        tokens(engine, prompt, params)


def test_options_are_checked(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="made for 512 tokens; give --max-model-len 512"):
        Engine.load(toy, ServeOptions(max_model_len=1024))
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Engine.load(tmp_path)


def test_a_folder_without_a_tokenizer_says_what_to_copy(tmp_path: Path) -> None:
    write_toy(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ServeError, match=r"copy tokenizer\.json"):
        Engine.load(tmp_path)


def drain(events: "SimpleQueue[Event]") -> list[Event]:
    return [events.get() for _ in range(events.qsize())]


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_a_scaled_context_is_offered_and_used(tmp_path: Path, field: str) -> None:
    folder = tmp_path / "yarn"
    write_toy(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "rope_scaling"):
        config.pop(name, None)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config |= {"max_position_embeddings": 64, field: {"rope_theta": 1e4, **yarn}}
    (folder / "config.json").write_text(json.dumps(config))
    prompt = list(range(100))
    with Engine.load(folder) as engine:
        assert engine.max_model_len == 256
        events = list(engine.generate(prompt, SamplingParams(temperature=0, max_tokens=20)))
    answer = [event.token_id for event in events if isinstance(event, TokenEvent)]
    model = pvrt.load(folder, dense=True)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, 100:]
    assert ids.tolist()[: len(answer)] == answer
    with Engine.load(folder, ServeOptions(max_model_len=200)) as engine:
        assert engine.max_model_len == 200
