"""Capacity: sizes against the tensors that engines really hold, and the sentences."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pvrt.errors import ServeError
from pvrt.kv_cache import cache_name
from pvrt.modules.whole_model import quantized_layers
from pvrt_kernels.cpu import library
from pvrt_server.backend import Decision, choose_backend
from pvrt_server.capacity import Capacity, Machine
from pvrt_server.engine.engine import Engine
from pvrt_server.opened import open_model
from pvrt_server.options import ServeOptions
from tests.fixtures.toy import toy_model, toy_tokenizer, write_toy, write_toy_grid

ROOMY = Machine("cpu", 10**11, 10**11, vllm=Path("vllm"))


def decide(folder: Path, engine: str, machine: Machine = ROOMY, **options: Any) -> Decision:
    """How a folder is served there by an engine."""
    chosen = ServeOptions(**options).changed(engine=engine)
    return choose_backend(open_model(folder), chosen, machine)


def fit(folder: Path, engine: str, machine: Machine = ROOMY, **options: Any) -> Capacity:
    """How a folder fits there."""
    return decide(folder, engine, machine, **options).capacity


def test_the_weights_are_counted_as_the_engine_will_hold_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_toy(tmp_path / "aqlm", dtype=torch.float16)
    dense = toy_model("llama")
    dense.half().save_pretrained(tmp_path / "dense")
    toy_tokenizer().save_pretrained(tmp_path / "dense")
    write_toy_grid(tmp_path / "grid", "llama", "w4g128")
    with caplog.at_level("INFO"):
        Engine.load(tmp_path / "aqlm").close()
    (said,) = (r.args for r in caplog.records if r.msg.startswith("loaded"))
    assert isinstance(said, tuple)
    found = fit(tmp_path / "aqlm", "local").weight_bytes
    assert found == pytest.approx(float(str(said[4])) * 1e6, rel=0.05)
    # On a CPU the embedded engine computes in float32, but keeps matrices in their 16 bits.
    parameters = sum(p.numel() for p in dense.parameters())
    matrices = sum(p.numel() for p in dense.parameters() if p.dim() == 2)
    local = fit(tmp_path / "dense", "local").weight_bytes
    head = dense.lm_head.weight
    rounded = head.numel() + 3 * 4 * len(head)  # in int8, with three numbers a row
    assert local == 4 * parameters - 2 * matrices + rounded
    caplog.clear()
    with caplog.at_level("INFO"):
        Engine.load(tmp_path / "dense").close()
    (said,) = (r.args for r in caplog.records if r.msg.startswith("loaded"))
    assert isinstance(said, tuple)
    assert local == pytest.approx(float(str(said[4])) * 1e6, rel=0.01)
    assert fit(tmp_path / "dense", "vllm").weight_bytes == 2 * parameters
    assert fit(tmp_path / "dense", "vllm", dtype="float32").weight_bytes == 4 * parameters
    assert fit(tmp_path / "grid", "local").weight_bytes == 4 * parameters + rounded
    assert fit(tmp_path / "grid", "vllm").weight_bytes < 1.1 * parameters


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma"])
@pytest.mark.parametrize("embeddings", [None, "2x8g4", "1x16g8"])
@pytest.mark.parametrize("decoded", [(), (4,), (4, 8)])
def test_weights_are_counted_as_the_engine_holds_them(
    tmp_path: Path,
    architecture: str,
    embeddings: str | None,
    decoded: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups of these sizes have no kernel: their layers are decoded, and no others."""
    monkeypatch.setattr(
        "pvrt.format.scheme.has_fast_kernel",
        lambda device, books, bits, group, out: group not in decoded,
    )
    schemes = {"q_proj": "3x8g4", "down_proj": "3x8g16"}
    write_toy(tmp_path, architecture, embeddings=embeddings, schemes=schemes, dtype=torch.float16)
    with Engine.load(tmp_path) as engine:
        model: Any = engine._runtime.model
        left = {layer.scheme.in_group_size for layer in quantized_layers(model.model).values()}
        assert left == {4, 8, 16} - set(decoded)
        held = model.weight_bytes
    assert fit(tmp_path, "local").weight_bytes == pytest.approx(held, rel=0.05)


def test_the_report_names_what_is_decoded_which_vllm_does_on_cpus_alone(tmp_path: Path) -> None:
    write_toy(tmp_path, schemes={"q_proj": "2x8g8o4"})
    for engine in ("local", "vllm"):
        assert decide(tmp_path, engine).weights == "packed, 2x8g8o4 decoded"
    assert decide(tmp_path, "vllm", replace(ROOMY, device="cuda")).weights == "packed"


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "deepseek_v3"])
def test_the_cache_is_counted_as_transformers_fills_it(tmp_path: Path, architecture: str) -> None:
    model = toy_model(architecture)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        cache = model(torch.randint(200, (1, 100)), use_cache=True)[cache_name()]
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    found = fit(tmp_path, "local")
    # transformers keeps a window's last token but one: the new one makes it whole.
    assert found.cache.bytes_for(100) == pytest.approx(held, rel=0.03)


def test_less_memory_means_a_shorter_context_and_says_what_is_missing(toy: Path) -> None:
    roomy = fit(toy, "local")
    assert (roomy.max_model_len, roomy.wanted_len) == (512, 512)
    assert roomy.concurrency > 1000
    fixed = ROOMY.free_bytes - roomy.cache_bytes
    half = Machine("cpu", fixed + roomy.cache.bytes_for(256), 10**11)
    tight = fit(toy, "local", half)
    assert (tight.max_model_len, tight.concurrency) == (256, 1)
    assert any("256 tokens of 512" in line and "more" in line for line in tight.lines())
    assert fit(toy, "local", max_model_len=100).max_model_len == 100


def test_a_model_that_cannot_start_is_refused_with_both_numbers(toy: Path) -> None:
    with pytest.raises(ServeError, match=r"needs 70\d MB to start, .* the CPU, 300 MB free"):
        fit(toy, "local", Machine("cpu", 3 * 10**8, 10**11))
    with pytest.raises(ServeError, match=r"needs 3\.0 GB .* 2 GPUs, 1\.0 GB free"):
        fit(toy, "vllm", Machine("cuda", 10**9, 10**11, gpus=2, vllm=Path("vllm")))


def test_layers_that_others_quantised_are_left_to_transformers(tmp_path: Path) -> None:
    toy_model("llama").save_pretrained(tmp_path)
    assert decide(tmp_path, "local").in_c == (library.library() is not None)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not decide(tmp_path, "local").in_c


def test_the_report_says_why_and_how_and_the_engine_does_it(toy: Path, tmp_path: Path) -> None:
    asked = decide(toy, "local")
    assert asked.report("m").startswith("m on the embedded engine, because --engine local asks for")
    assert f"weights     {asked.capacity.weight_bytes / 1e6:.0f} MB, packed" in asked.report("m")
    missing = decide(toy, "auto", Machine("cpu", 10**11, 10**11))
    assert "m on the embedded engine, because vLLM is not installed" in missing.report("m")
    assert decide(toy, "auto").report("m").startswith("m on vLLM, because it is installed")
    with Engine.load(toy, ServeOptions(max_model_len=100, cache_bytes=10**6)) as engine:
        decided = decide(toy, "local", max_model_len=100, cache_bytes=10**6)
        assert engine.max_model_len == decided.capacity.max_model_len == 100
        assert engine._runtime.cache_tokens == decided.cache_tokens
    with pytest.raises(ServeError, match=r"made for 512 tokens; give --max-model-len 512"):
        decide(toy, "vllm", max_model_len=513)
    per_token = asked.capacity.cache.bytes_for(1)
    with pytest.raises(ServeError, match=r"a context of 200 tokens .* Try: --max-model-len 100"):
        decide(toy, "local", max_model_len=200, cache_bytes=100 * per_token)
