"""The C program for Llama-like models against transformers, token by token."""

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pvrt
from pvrt.errors import ServeError
from pvrt.modules.whole_model import pack_model, quantized_layers
from pvrt_kernels.cpu import library, products, rounding
from pvrt_kernels.cpu.decoder_program import Rounded
from pvrt_server.backend import runs_in_c
from pvrt_server.engine import cpu_model
from pvrt_server.engine.cpu_model import CpuModel
from pvrt_server.engine.engine import Engine
from pvrt_server.engine.models import TransformersModel
from pvrt_server.options import ServeOptions
from tests.fixtures.instruction_sets import relative
from tests.fixtures.toy import toy_model, toy_tokenizer, write_toy
from tests.fixtures.turning import turning

pytestmark = pytest.mark.skipif(library.library() is None, reason="the C library is not built")
PROMPT = list(range(60, 90))


def loaded(folder: Path) -> Any:
    model = pvrt.load(folder, dtype=torch.float32)
    pack_model(model, torch.float32)
    return model


def logits_after(model: Any, steps: int, argmax_only: bool = False) -> Tensor:
    """Logits [steps, V] of greedy decoding; a prompt, then a token at a time."""
    rows = []
    with torch.inference_mode():
        state = model.start()
        rows.append(model.read(state, PROMPT, 1)[0].clone())
        for _ in range(steps - 1):
            token = int(rows[-1].argmax())
            rows.append(model.step([state], [token], argmax_only)[0].clone())
    return torch.stack(rows)


def tolerance(model: Any) -> float:
    """Of logits: errors of all products that a token passes, four in a layer, and of lm_head."""
    layers: int = model.config.num_hidden_layers
    return (4 * layers + 1) * rounding.relative_error()


def assert_same_largest(row: Tensor, target: Tensor, relative_error: float) -> None:
    """What a step with argmax_only promises."""
    near = relative_error * float(target.norm())  # no element is farther off than the whole row
    assert float(row.max()) == pytest.approx(float(target.max()), abs=near)
    assert float(target.max() - target[row.argmax()]) <= near  # a tie, if it is another token


CASES = [
    ("llama", "2x8g8", torch.float32),
    ("llama-tied", "1x16g8", torch.float16),
    ("mistral", "1x8g8", torch.bfloat16),
    ("qwen2", "2x8g8", torch.float32),
    ("qwen3", "4x8g8", torch.float32),
]


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen3"])
@pytest.mark.parametrize("embeddings", ["2x8g4", "5x8g8", "1x16g8"])
def test_embeddings_in_codes(isa: str, tmp_path: Path, architecture: str, embeddings: str) -> None:
    """Rows and logits come from one packed weight, where the head is tied to the embedding."""
    schemes = {"q_proj": "4x8g8", "down_proj": "3x8g16"}
    write_toy(tmp_path, architecture, embeddings=embeddings, schemes=schemes)
    model = loaded(tmp_path)
    dense = TransformersModel(pvrt.load(tmp_path, dense=True, dtype=torch.float32))
    expected = logits_after(dense, 8)
    assert relative(logits_after(CpuModel(model), 8), expected) < tolerance(model)
    for row, target in zip(logits_after(CpuModel(model), 8, True), expected, strict=True):
        assert_same_largest(row, target, tolerance(model))


@pytest.mark.parametrize("embeddings", [None, "2x8g4"])
def test_a_token_reads_the_weights_but_an_untied_embedding(
    tmp_path: Path, embeddings: str | None
) -> None:
    for architecture in ("llama", "llama-tied"):
        write_toy(tmp_path / architecture, architecture, embeddings=embeddings)
        model = pvrt.load(tmp_path / architecture)
        unread = "model.embed_tokens." if architecture == "llama" else "none"
        read = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith(unread))
        assert TransformersModel(model).bytes_per_token == read


@pytest.mark.parametrize(("architecture", "scheme", "dtype"), CASES)
def test_logits_are_those_of_transformers(
    isa: str, tmp_path: Path, architecture: str, scheme: str, dtype: torch.dtype
) -> None:
    write_toy(tmp_path, architecture, scheme, dtype=dtype)
    model = loaded(tmp_path)
    assert runs_in_c(model.config, "cpu")
    expected = logits_after(
        TransformersModel(pvrt.load(tmp_path, dense=True, dtype=torch.float32)), 12
    )
    found = logits_after(CpuModel(model), 12)
    assert relative(found, expected) < tolerance(model)


@pytest.mark.parametrize(
    ("case", "batch", "isa"),
    turning(CASES, [(11, False), (11, True), (3, True)], library.INSTRUCTION_SETS),
    indirect=["isa"],
)
def test_sequences_of_one_step_do_not_meet(
    isa: str, tmp_path: Path, case: tuple[str, str, torch.dtype], batch: tuple[int, bool]
) -> None:
    """One token goes through other tables than three do: both are right within the tolerance."""
    (architecture, scheme, dtype), (rows, argmax_only) = case, batch
    write_toy(tmp_path, architecture, scheme, dtype=dtype)
    model = CpuModel(loaded(tmp_path), rows)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        lengths = torch.randint(1, 40, (rows,), generator=generator).tolist()
        prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
        expected, states = [], []
        for number, prompt in enumerate(prompts):
            alone, state = model.start(), model.start()
            model.read(alone, prompt, 1)
            model.read(state, prompt, 1)
            expected.append(model.step([alone], [number])[0].clone())
            states.append(state)
        found = model.step(states, list(range(rows)), argmax_only)
    for row, target in zip(found, expected, strict=True):
        assert_same_largest(row, target, tolerance(model.model))
        if not argmax_only:
            assert relative(row, target) < tolerance(model.model)
    assert [state.length for state in states] == [n + 1 for n in lengths]


@pytest.mark.parametrize("kind", [CpuModel, TransformersModel])
def test_a_copy_goes_its_own_way(tmp_path: Path, kind: type) -> None:
    write_toy(tmp_path, "llama")
    model = kind(loaded(tmp_path))
    with torch.inference_mode():
        state, other = model.start(), model.start()
        model.read(state, PROMPT, 1)
        copy = model.copy(state, 5)
        assert copy.length == 5
        found = model.read(copy, [7, 8, 9], 1).clone()
        model.read(other, [*PROMPT[:5], 7, 8, 9], 1)
        again = model.step([state], [3]).clone()
        expected = model.start()
        model.read(expected, PROMPT, 1)
        torch.testing.assert_close(again, model.step([expected], [3]))
        # Three tokens at a time and eight are looked up in tables of different precision.
        whole = model.read(model.start(), [*PROMPT[:5], 7, 8, 9], 1)
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)


def test_models_with_a_window_are_not_copied(tmp_path: Path) -> None:
    write_toy(tmp_path, "gemma3_text")
    model = TransformersModel(pvrt.load(tmp_path, dense=True))
    with torch.inference_mode():
        state = model.start()
        model.read(state, PROMPT, 1)
        assert model.copy(state, 3) is None


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(tmp_path: Path, threads: int) -> None:
    write_toy(tmp_path, "llama")
    model = CpuModel(loaded(tmp_path))
    alone = logits_after(model, 8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(logits_after(model, 8)[1:], alone[1:])
    finally:
        torch.set_num_threads(before)


def test_screened_logits_have_the_exact_maximum(isa: str, tmp_path: Path) -> None:
    write_toy(tmp_path, "llama-tied", dtype=torch.bfloat16)
    model = CpuModel(loaded(tmp_path))
    exact, screened = logits_after(model, 40), logits_after(model, 40, argmax_only=True)
    assert torch.equal(exact.argmax(-1), screened.argmax(-1))
    assert torch.equal(exact.amax(-1), screened.amax(-1))
    assert not torch.equal(exact, screened)  # most rows were not computed again


def test_rounding_bounds_hold() -> None:
    weight = torch.randn(50, 64).bfloat16()
    weight[3] = 0
    rounded = Rounded(weight)
    scale, error, norm = rounded.bounds.unbind(1)
    again = rounded.rows.double() * scale.double()[:, None]
    assert bool(((weight.double() - again).norm(dim=1) <= error).all())
    assert bool((again.norm(dim=1) <= norm).all())


def test_a_cache_that_grows_keeps_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_toy(tmp_path, "llama")
    model = loaded(tmp_path)
    expected = logits_after(CpuModel(model), 40)
    monkeypatch.setattr(cpu_model, "_FIRST_CAPACITY", 16)
    assert torch.equal(logits_after(CpuModel(loaded(tmp_path)), 40), expected)


def test_the_engine_takes_it_and_dense_weights_keep_sixteen_bits(tmp_path: Path) -> None:
    write_toy(tmp_path, "llama-tied", dtype=torch.bfloat16)
    with Engine.load(tmp_path) as engine:
        model = engine._runtime.model
        assert isinstance(model, CpuModel)
        assert isinstance(model._head, Tensor)
        assert model._head.dtype == torch.bfloat16
        assert model._head is model._embedding
    with Engine.load(tmp_path, ServeOptions(dtype="bfloat16")) as engine:
        assert isinstance(engine._runtime.model, TransformersModel)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_models_that_are_not_quantised_run_in_it_as_they_are_stored(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    toy_model(architecture).to(dtype).save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    with Engine.load(tmp_path, ServeOptions(dtype="float32")) as engine:
        model = engine._runtime.model
    assert isinstance(model, CpuModel)
    assert {p.dtype for p in model.model.parameters() if p.dim() == 2} == {dtype}
    reference = TransformersModel(pvrt.load(tmp_path, dtype=torch.float32))
    expected = logits_after(reference, 12)
    torch.testing.assert_close(logits_after(model, 12), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("stored", "asked", "rounds"),
    [
        (torch.bfloat16, "auto", True),
        (torch.bfloat16, "float32", False),
        (torch.float32, "auto", False),
    ],
)
def test_prompts_of_models_published_in_16_bits_may_be_rounded(
    tmp_path: Path, stored: torch.dtype, asked: Any, rounds: bool
) -> None:
    """A prompt's logits are within bfloat16's error; torch's own setting stays as it was."""
    write_toy(tmp_path, "llama", dtype=stored)
    with Engine.load(tmp_path, ServeOptions(dtype=asked)) as engine:
        model = engine._runtime.model
    assert isinstance(model, CpuModel)
    prompt = [5 + 3 * i for i in range(64)]
    with torch.inference_mode():
        found = model.read(model.start(), prompt, 1)
        assert torch.get_float32_matmul_precision() == "highest"
        exact = CpuModel(loaded(tmp_path)).read(model.start(), prompt, 1)
    error = float((found - exact).norm() / exact.norm())
    assert error < 2e-2
    assert (error > 1e-5) == (rounds and products.multiplies_bfloat16())


def test_more_sequences_than_the_program_runs_are_refused(toy: Path) -> None:
    with pytest.raises(ServeError, match="--max-num-seqs is 65; this model runs at most 64"):
        Engine.load(toy, ServeOptions(max_num_seqs=65))


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux")
def test_the_memory_of_a_cache_goes_back_to_the_system(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    write_toy(tmp_path, "llama")
    model = CpuModel(loaded(tmp_path))
    before = resident()
    rooms = [model._room_for(512) for _ in range(200)]
    size = sum(room.nbytes for room in rooms)
    unwritten = resident() - before
    for room in rooms:
        room.fill_(1)
    written = resident() - before
    del rooms, room
    assert unwritten < 0.2 * size
    assert written > 0.8 * size
    assert resident() - before < 0.2 * size


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma3_text"},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "dynamic"}},
        {"layer_types": ["sliding_attention"]},
    ],
)
def test_what_the_program_does_not_compute_is_left_to_transformers(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    write_toy(tmp_path, "llama")
    model = pvrt.load(tmp_path, dtype=torch.float32)
    assert runs_in_c(model.config, "cpu")
    for name, value in change.items():
        setattr(model.config, name, value)
    assert not runs_in_c(model.config, "cpu")


def test_packed_models_save_the_checkpoint_they_came_from(tmp_path: Path) -> None:
    write_toy(tmp_path, "llama")
    before = pvrt.load(tmp_path, dtype=torch.float32).state_dict()
    model = loaded(tmp_path)
    assert all(layer.packed is not None for layer in quantized_layers(model).values())
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
