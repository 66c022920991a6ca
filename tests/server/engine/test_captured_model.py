"""Steps that are recorded and replayed, as CUDA graphs are, against transformers."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import pvrt
from pvrt.modules.whole_model import pack_model
from pvrt_kernels.cpu import library, rounding
from pvrt_server.engine import loading
from pvrt_server.engine.captured_model import CapturedModel, _fused, _plain_norms
from pvrt_server.engine.engine import Engine
from pvrt_server.engine.models import TransformersModel
from pvrt_server.engine.sampling import SamplingParams
from pvrt_server.engine.sequences import TokenEvent
from tests.fixtures import tape
from tests.fixtures.c_library import without_c_library
from tests.fixtures.instruction_sets import relative
from tests.fixtures.toy import toy_model, write_toy

ROOM = 4096
NEAR = 1e-5  # float32, sums in another order


class Both:
    """The same sequences in a captured model and in one of transformers: logits are compared."""

    def __init__(self, model: Any, record: Any = tape.record, near: float = NEAR) -> None:
        self.near = near
        self.models = CapturedModel(model, record, ROOM), TransformersModel(model)
        self.states: dict[str, tuple[Any, Any]] = {}

    def read(self, name: str, tokens: list[int]) -> None:
        if name not in self.states:
            self.states[name] = self.models[0].start(), self.models[1].start()
        ours, theirs = zip(self.models, self.states[name], strict=True)
        self._same(ours[0].read(ours[1], tokens, 1), theirs[0].read(theirs[1], tokens, 1))

    def step(self, names: str, token: int = 7) -> None:
        tokens = [token + index for index in range(len(names))]
        rows = [
            model.step([self.states[name][which] for name in names], tokens)
            for which, model in enumerate(self.models)
        ]
        self._same(*rows)

    def copy(self, name: str, new: str, length: int) -> None:
        pairs = zip(self.models, self.states[name], strict=True)
        first, second = (model.copy(state, length) for model, state in pairs)
        self.states[new] = first, second

    def _same(self, ours: Tensor, theirs: Tensor) -> None:
        assert ours.dtype == torch.float32
        assert relative(ours, theirs) < self.near
        for pair in self.states.values():
            assert pair[0].length == pair[1].length


def loaded(folder: Path, **toy: Any) -> Any:
    write_toy(folder, **toy)
    return pvrt.load(folder, dtype=torch.float32)


CASES = {
    "llama": {"architecture": "llama"},
    "biases": {"architecture": "qwen2"},
    "norms of queries": {"architecture": "qwen3"},
    "scaled embeddings": {"architecture": "gemma"},
    "one projection": {"architecture": "phi3"},
    "experts": {"architecture": "mixtral"},
    "compressed keys": {"architecture": "deepseek_v3"},
}


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_sequences_join_and_leave(tmp_path: Path, case: str) -> None:
    join_and_leave(Both(loaded(tmp_path, **CASES[case])))


@pytest.mark.skipif(library.library() is None, reason="the C library is not built")
@pytest.mark.parametrize("architecture", ["llama-tied", "gemma"])
@torch.inference_mode()
def test_packed_layers_and_heads(tmp_path: Path, architecture: str) -> None:
    model = loaded(tmp_path, architecture=architecture, embeddings="2x8g4")
    pack_model(model, torch.float32)
    products = 4 * model.config.num_hidden_layers + 1
    join_and_leave(Both(model, near=products * rounding.relative_error()))


def join_and_leave(both: Both) -> None:
    for number, name in enumerate("abcde"):
        both.read(name, list(range(60 + number, 70 + 3 * number)))
    for names in ("a", "a", "ab", "abc", "cab", "abcde", "abcde", "bde", "e", "ea", "bcda", "bc"):
        both.step(names, 7 + len(names))
    captured = both.models[0]
    assert captured._batch.members and set(captured._graphs) >= {(1, 256), (8, 256), (2, 256)}


@torch.inference_mode()
def test_buffers_grow(tmp_path: Path) -> None:
    both = Both(loaded(tmp_path))
    both.read("a", [1 + i % 200 for i in range(254)])
    both.read("b", [5, 6, 7])
    for _ in range(4):
        both.step("a")
        both.step("ba")
    assert set(both.models[0]._graphs) == {(1, 256), (2, 256), (1, 512), (2, 512)}
    both.step("b")  # the smaller one again, in which "a" lay


@torch.inference_mode()
def test_what_was_read_goes_on_being_read(tmp_path: Path) -> None:
    """A prompt's next piece and copies, while the sequence is in a graph's rows."""
    both = Both(loaded(tmp_path))
    both.read("a", [5, 6, 7, 8])
    both.read("b", [9, 10])
    both.step("ab")
    both.copy("a", "c", 3)
    both.step("abc")
    both.read("a", [1, 2, 3])
    both.step("cb")
    both.step("ac")


@torch.inference_mode()
def test_infinities_of_a_sequence_stay_its_own(tmp_path: Path) -> None:
    both = Both(loaded(tmp_path))
    both.read("a", [5, 6, 7, 8, 9, 10])
    both.step("a")
    for tensor in both.models[0]._batch.kept(both.states["a"][0], 7)[0]:
        tensor.fill_(torch.inf)
    both.read("b", [9])
    both.step("b")


@torch.inference_mode()
def test_few_buffers_are_kept(tmp_path: Path) -> None:
    both = Both(loaded(tmp_path))
    both.models[0]._room = 512
    for name in "abcde":
        both.read(name, [5, 6])
    for names, kept in (("a", [1]), ("ab", [1, 2]), ("abcde", [2, 8]), ("a", [1]), ("ab", [1, 2])):
        both.step(names)
        assert [rows for rows, _ in both.models[0]._graphs] == kept


def test_an_engine_answers_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that come and go, prompts that begin alike."""
    write_toy(tmp_path, "llama")
    texts = ["Hello", "Hello, how are you today, all of you?", "Hello, how are you today, then?"]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    made: list[CapturedModel] = []

    def captured(model: Any) -> CapturedModel:
        made.append(CapturedModel(model, tape.record, ROOM))
        return made[0]

    def answers() -> list[list[int]]:
        with without_c_library(), Engine.load(tmp_path) as engine:
            ids = [engine.codec.encode(text) for text in texts]

            def answer(prompt: list[int]) -> list[int]:
                events = engine.generate(prompt, params)
                return [event.token_id for event in events if isinstance(event, TokenEvent)]

            with ThreadPoolExecutor(3) as pool:
                return [*pool.map(answer, ids), *map(answer, reversed(ids))]

    expected = answers()
    monkeypatch.setattr(loading, "TransformersModel", captured)
    assert answers() == expected
    assert (1, 256) in made[0]._graphs


class OffsetNorm(LlamaRMSNorm):  # type: ignore[misc]
    """Its weights are zero where they change nothing, as Gemma's."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + super().forward(x) / self.weight


@pytest.mark.parametrize(("architecture", "plain"), [("qwen3", 9), ("llama", 5)])
def test_plain_norms_are_found_and_given_back(architecture: str, plain: int) -> None:
    model = toy_model(architecture)
    model.model.norm = OffsetNorm(128)
    hooked = model.model.layers[0].input_layernorm
    hooked.forward = hooked.forward
    found = _plain_norms(model)
    assert len(found) == plain - 2
    with _fused(found):
        assert all("forward" in vars(norm) for norm in found)
    assert not any("forward" in vars(norm) for norm in found)
    assert "forward" in vars(hooked)


def frozen(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A recorder that runs nothing again."""
    result = compute()
    return lambda: result


@torch.inference_mode()
def test_a_recorder_that_replays_nothing_is_noticed(tmp_path: Path) -> None:
    both = Both(loaded(tmp_path), frozen)
    both.read("a", [5, 6, 7])
    with pytest.raises(AssertionError):
        both.step("a")


def fails(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    compute()
    raise RuntimeError("operation not permitted when stream is capturing")


@torch.inference_mode()
def test_what_cannot_be_recorded_goes_through_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = Both(loaded(tmp_path), fails)
    for name in "ab":
        both.read(name, [5, 6, 7])
    with caplog.at_level(logging.WARNING, "pvrt_server"):
        for names in ("a", "ab", "ab", "b"):
            both.step(names)
    (record,) = caplog.records
    assert record.getMessage() == (
        "tokens are decoded without a CUDA graph: operation not permitted when stream is capturing"
    )


@pytest.mark.parametrize("enough", [True, False])
@torch.inference_mode()
def test_too_little_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture, enough: bool) -> None:
    """Other graphs make room; where that is not enough, larger steps alone are not recorded."""
    both = Both(loaded(tmp_path))
    captured = both.models[0]

    def record(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        rows = len(compute())
        if rows > 2 and (captured._graphs or not enough):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tape.record(compute)

    captured._record = record
    for name in "abc":
        both.read(name, [5, 6, 7])
    with caplog.at_level(logging.WARNING, "pvrt_server"):
        for names in ("ab", "abc", "abc"):
            both.step(names)
        assert set(captured._graphs) == ({(4, 256)} if enough else set())
        for names in ("ab", "abc"):
            both.step(names)
    messages = [record.getMessage() for record in caplog.records]
    refused = "4 x 256 tokens are decoded without a CUDA graph: CUDA out of memory"
    assert messages == ([] if enough else [refused])
    assert (2, 256) in captured._graphs


@pytest.mark.parametrize(
    ("architecture", "attention", "words"),
    [
        ("gemma3_text", "sdpa", "sliding windows"),
        ("llama", "eager", "attention is eager"),
    ],
)
@torch.inference_mode()
def test_models_that_stay_as_they_are(
    tmp_path: Path,
    architecture: str,
    attention: str,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = loaded(tmp_path, architecture=architecture)
    model.set_attn_implementation(attention)
    both = Both(model)
    for name in "ab":
        both.read(name, [5, 6, 7])
    with caplog.at_level(logging.WARNING, "pvrt_server"):
        for names in ("a", "ab"):
            both.step(names)
    (record,) = caplog.records
    assert words in record.getMessage()
    assert not both.models[0]._graphs
