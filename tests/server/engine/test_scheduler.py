"""Many requests at once: who runs when, and that nobody's answer depends on the others."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from pvrt.kv_cache import cache_shape
from pvrt_server.engine.engine import Engine, Event, FailureEvent
from pvrt_server.engine.prefix_cache import shared
from pvrt_server.engine.sampling import SamplingParams
from pvrt_server.engine.sequences import GenerationRequest, PromptEvent, TokenEvent
from pvrt_server.errors import GenerationError, RequestError
from pvrt_server.options import ServeOptions
from tests.fixtures.toy import write_toy
from tests.server.running import PATIENCE, scripted_engine, wait_until

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def prompts(number: int, length: int = 40) -> list[list[int]]:
    return [[(7 * i + 13 * n) % 256 for i in range(length)] for n in range(number)]


def at_once(
    engine: Engine, asked: Sequence[Sequence[int]], params: SamplingParams = GREEDY
) -> list[list[int]]:
    """Answers to prompts of one job, none of which can finish before all are there."""
    events: SimpleQueue[Event] = SimpleQueue()
    engine.submit([GenerationRequest(tuple(prompt), params) for prompt in asked], events.put)
    answers: list[list[int]] = [[] for _ in asked]
    left = len(asked)
    while left:
        event = events.get(timeout=PATIENCE)
        assert not isinstance(event, FailureEvent)
        if isinstance(event, TokenEvent):
            answers[event.index].append(event.token_id)
        left -= event.finish_reason is not None
    return answers


def alone(engine: Engine, prompt: Sequence[int], params: SamplingParams = GREEDY) -> list[int]:
    return [e.token_id for e in engine.generate(prompt, params) if isinstance(e, TokenEvent)]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_answers_are_the_same_alone_and_in_company(tmp_path: Path, architecture: str) -> None:
    write_toy(tmp_path, architecture)
    asked = [prompt[: 5 + 6 * n] for n, prompt in enumerate(prompts(6, 60))]
    with Engine.load(tmp_path, ServeOptions(max_num_seqs=1)) as engine:
        expected = [alone(engine, prompt) for prompt in asked]
    with Engine.load(tmp_path, ServeOptions(max_num_seqs=4, prefill_chunk=16)) as engine:
        assert at_once(engine, asked) == expected


def test_a_seed_repeats_in_company(toy: Path) -> None:
    params = SamplingParams(seed=5, max_tokens=12, ignore_eos=True)
    with Engine.load(toy) as engine:
        expected = alone(engine, prompts(1)[0], params)
        assert at_once(engine, prompts(6), params)[0] == expected


def test_sequences_join_a_running_batch_and_leave_it(toy: Path) -> None:
    engine, model = scripted_engine(toy, "abcdefgh", max_sequences=3)
    with engine:
        assert [len(answer) for answer in at_once(engine, prompts(7, 4))] == [20] * 7
    assert max(model.steps) == 3


def test_others_go_on_while_a_long_prompt_is_read(toy: Path) -> None:
    engine, model = scripted_engine(toy, "x" * 300, prefill_chunk=64)
    model.hold_after = 4
    with engine:
        first = GenerationRequest((1, 2), SamplingParams(temperature=0, max_tokens=300))
        job = engine.submit([first], lambda event: None)
        wait_until(lambda: not model.gate.is_set())
        read = threading.Event()
        long = GenerationRequest(tuple(range(1, 201)), GREEDY)
        engine.submit([long], lambda event: read.set())
        model.gate.set()
        assert read.wait(PATIENCE)
        pieces = model.reads[1:]
        assert max(pieces) == 8  # an eighth of 64
        assert len(model.steps) - 4 >= len(pieces) - 1  # one step between any two
        job.cancel()


def test_a_short_prompt_does_not_wait_for_a_long_one(toy: Path) -> None:
    engine, model = scripted_engine(toy, "ok", prefill_chunk=8)
    model.gate.clear()
    order: SimpleQueue[str] = SimpleQueue()
    with engine:
        for name, length in (("long", 400), ("short", 4)):
            request = GenerationRequest((7,) * length, GREEDY)
            engine.submit([request], lambda event, name=name: order.put(name))  # type: ignore[misc]
        model.gate.set()
        assert order.get(timeout=PATIENCE) == "short"


def test_a_job_of_many_prompts_is_no_wall(toy: Path) -> None:
    engine, model = scripted_engine(toy, "abcdefgh", max_sequences=2)
    model.gate.clear()
    order: list[str] = []
    done = threading.Event()

    def note(name: str, event: Event) -> None:
        if isinstance(event, TokenEvent) and event.finish_reason:
            order.append(name)
            if len(order) == 13:
                done.set()

    with engine:
        many = [GenerationRequest((n, 2, 3), GREEDY) for n in range(12)]
        engine.submit(many, lambda event: note("many", event))
        engine.submit([GenerationRequest((1, 2), GREEDY)], lambda event: note("one", event))
        model.gate.set()
        assert done.wait(PATIENCE)
    assert order.index("one") <= 2


def test_a_known_beginning_is_not_read_again(toy: Path) -> None:
    head = prompts(1, 60)[0]
    with Engine.load(toy) as engine:
        expected = alone(engine, [*head, 1, 2, 3])
        events = list(engine.generate([*head, 4, 5], GREEDY))
        assert isinstance(events[0], PromptEvent)
        assert events[0].cached == 60
        # A conversation goes on: prompt and answer are known but for the last token.
        answer = alone(engine, [*head, 9])
        first = next(iter(engine.generate([*head, 9, *answer, 7, 7], GREEDY)))
        assert isinstance(first, PromptEvent)
        assert first.cached == 60 + len(answer)
        assert alone(engine, [*head, 1, 2, 3]) == expected


def test_choices_of_one_prompt_read_it_once(toy: Path) -> None:
    prompt = prompts(1, 200)[0]
    params = SamplingParams(temperature=0, max_tokens=4)
    cached: SimpleQueue[int] = SimpleQueue()

    def note(event: Event) -> None:
        if isinstance(event, PromptEvent):
            cached.put(event.cached)

    with Engine.load(toy, ServeOptions(prefill_chunk=64)) as engine:
        engine.submit([GenerationRequest(tuple(prompt), params)] * 4, note)
        found = sorted(cached.get(timeout=PATIENCE) for _ in range(4))
    assert found == [0, 199, 199, 199]


def test_prompt_scores_do_not_use_what_is_known(toy: Path) -> None:
    prompt = prompts(1)[0]
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)
    with Engine.load(toy) as engine:
        first = list(engine.generate(prompt, params))
        second = list(engine.generate(prompt, params))
    assert isinstance(second[0], PromptEvent)
    assert len(second[0].logprobs) == len(prompt)
    assert first == second


def test_a_full_cache_puts_sequences_back_and_loses_nothing(toy: Path) -> None:
    asked = prompts(5, 40)
    with Engine.load(toy) as engine:
        expected = [alone(engine, prompt) for prompt in asked]
    per_token = cache_shape(engine.opened.config, 4).bytes_for(1)
    small = ServeOptions(cache_bytes=130 * per_token, max_model_len=100)
    with Engine.load(toy, small) as engine:
        assert at_once(engine, asked) == expected
        text = engine.metrics.expose("toy").decode()
    preempted = next(line for line in text.splitlines() if "num_preemptions_total{" in line)
    assert float(preempted.split()[-1]) > 0


def test_a_step_that_lacks_memory_costs_the_youngest_only(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompts(3, 30)
    with Engine.load(toy) as engine:
        expected = [alone(engine, prompt) for prompt in asked]
    with Engine.load(toy) as engine:
        model = engine._runtime.model
        read, step, calls = model.read, model.step, [0]
        submitted = threading.Event()

        def waiting(state: Any, tokens: Any, keep: int) -> Any:
            assert submitted.wait(PATIENCE)
            return read(state, tokens, keep)

        def failing(states: Any, tokens: Any, argmax_only: bool = False) -> Any:
            calls[0] += len(states) == 3
            if calls[0] == 5:
                calls[0] += 1
                raise MemoryError("no room")
            return step(states, tokens, argmax_only)

        monkeypatch.setattr(model, "read", waiting)
        monkeypatch.setattr(model, "step", failing)
        results: list[SimpleQueue[Event]] = [SimpleQueue() for _ in asked]
        for prompt, queue in zip(asked, results, strict=True):
            engine.submit([GenerationRequest(tuple(prompt), GREEDY)], queue.put)
        submitted.set()
        answers: list[Any] = []
        for queue in results:
            tokens: list[int] = []
            while True:
                event = queue.get(timeout=PATIENCE)
                if isinstance(event, FailureEvent):
                    answers.append(event.error)
                    break
                if isinstance(event, TokenEvent):
                    tokens.append(event.token_id)
                if event.finish_reason is not None:
                    answers.append(tokens)
                    break
        assert answers[:2] == expected[:2]
        assert isinstance(answers[2], GenerationError)
        assert engine.failure is None


def test_a_known_beginning_that_memory_does_not_take_is_read_again(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prompts(1, 60)[0]
    second = [*first[:50], *range(1, 20)]
    with Engine.load(toy) as engine:
        expected = alone(engine, second)
    with Engine.load(toy) as engine:
        copies = []

        def failing(state: Any, length: int) -> Any:
            copies.append(length)
            raise MemoryError("no room")

        monkeypatch.setattr(engine._runtime.model, "copy", failing)
        alone(engine, first)
        assert alone(engine, second) == expected
        assert copies == [50]
        assert alone(engine, second) == expected
        assert engine.failure is None


def test_too_many_answers_at_once_are_refused(toy: Path) -> None:
    engine, _ = scripted_engine(toy, "ok")
    with engine, pytest.raises(RequestError, match="the most is 2048"):
        engine.submit([GenerationRequest((1,), GREEDY)] * 2049, lambda event: None)


@pytest.mark.parametrize("length", [0, 1, 2, 15, 16, 17, 100])
def test_shared_beginnings_are_counted(length: int) -> None:
    first = list(range(200))
    second = [*first[:length], -1, *first[length:]]
    assert shared(tuple(first), second) == length
    assert shared(first[:length], first) == length


def test_reuse_can_be_turned_off(toy: Path) -> None:
    with Engine.load(toy, ServeOptions(prefix_reuse=False)) as engine:
        for _ in range(2):
            first = next(iter(engine.generate(prompts(1)[0], GREEDY)))
            assert isinstance(first, PromptEvent)
            assert first.cached == 0


def test_pieces_of_a_slow_prompt_are_bounded_by_their_time(toy: Path) -> None:
    """At 4 ms a token, half a second is 64 tokens (of 512), a tenth is 16 (of 64)."""
    engine, model = scripted_engine(toy, "x" * 60)
    read = model.read

    def slow(state: Any, tokens: Any, keep: int) -> Any:
        time.sleep(0.004 * len(tokens))
        return read(state, tokens, keep)

    model.read = slow  # type: ignore[method-assign]
    events: SimpleQueue[Event] = SimpleQueue()
    params = SamplingParams(temperature=0, max_tokens=50)
    asked = [tuple(range(100, 100 + n)) * 8 for n in (56, 40)]
    with engine:
        for prompt in asked:
            engine.submit([GenerationRequest(prompt, params)], events.put)
        finished = 0
        while finished < 2:
            finished += events.get().finish_reason is not None  # type: ignore[union-attr]
    assert max(model.reads) <= 128
    assert max(model.reads[1:]) <= 64
    # Both are read in turns; what is left of the longer one is read while the other decodes.
    assert max(model.reads[-4:]) <= 16
    assert sum(model.reads) == sum(map(len, asked))
