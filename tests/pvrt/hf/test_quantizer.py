"""AQLM checkpoints through `AutoModelForCausalLM.from_pretrained`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pvrt
from pvrt.errors import CheckpointError
from pvrt.modules.aqlm_embedding import AQLMEmbedding, TiedHead
from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt.modules.whole_model import pack_model, quantized_layers
from tests.fixtures.published import LAYOUTS, write_published
from tests.fixtures.toy import ARCHITECTURES, write_toy

pytestmark = pytest.mark.filterwarnings("ignore:no .* kernel for cpu")
PROMPT = torch.tensor([[72, 101, 108, 108, 111, 32, 119]])


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(PROMPT).logits
    return result


@pytest.mark.parametrize("published", [False, True], ids=["ours", "published"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_those_of_the_dense_model(
    tmp_path: Path, architecture: str, published: bool
) -> None:
    dense = write_toy(tmp_path, architecture, published=published)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert quantized_layers(model)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["1x16g8", "2x12g8", "1x8g4", "2x8g8o4"])
def test_every_scheme_loads(tmp_path: Path, scheme: str) -> None:
    dense = write_toy(tmp_path, "llama", scheme)
    model = pvrt.load(tmp_path)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)


MIXED = {"q_proj": "4x8g8", "down_proj": "3x8g16", "layers.1.mlp.up_proj": "1x8g8"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embeddings_and_layers_of_several_schemes_load(tmp_path: Path, architecture: str) -> None:
    """Unmodified transformers; tied heads stay tied; what is saved is what was loaded."""
    from transformers import AutoModelForCausalLM

    dense = write_toy(tmp_path / "a", architecture, embeddings="2x8g4", schemes=MIXED)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert isinstance(model.get_input_embeddings(), AQLMEmbedding)
    tied = dense.config.tie_word_embeddings
    assert isinstance(model.get_output_embeddings(), TiedHead if tied else AQLMLinear)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(PROMPT, **options), dense.generate(PROMPT, **options))
    model.tie_weights()
    assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = pvrt.load(tmp_path / "b")
    pack_model(again, torch.float32)
    torch.testing.assert_close(logits(again), logits(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys", [("lm_head", "model.embed_tokens"), (r"lm_h.*", r"^model\.embed")])
def test_heads_are_tied_by_names_of_modules_and_patterns_too(
    tmp_path: Path, keys: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_tied_weights_keys", {keys[0]: keys[1]})
    dense = write_toy(tmp_path, "llama-tied", embeddings="2x8g4")
    model = pvrt.load(tmp_path)
    model.tie_weights()
    assert isinstance(model.lm_head, TiedHead)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    model = pvrt.load(tmp_path, dense=True)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("architecture", ["llama", "gemma", "gemma3_text"])
def test_embeddings_in_codes_decode_once(tmp_path: Path, architecture: str) -> None:
    dense = write_toy(tmp_path / "a", architecture, embeddings="2x8g4")
    model = pvrt.load(tmp_path / "a", dense=True)
    assert not quantized_layers(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    assert (head.weight is embedding.weight) == dense.config.tie_word_embeddings
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "b")
    torch.testing.assert_close(
        logits(pvrt.load(tmp_path / "b")), logits(dense), rtol=1e-4, atol=1e-5
    )


def test_codes_of_a_tied_head_are_refused(tmp_path: Path) -> None:
    """Two weights where config.json says that there is one."""
    write_toy(tmp_path, "llama", embeddings="2x8g4")
    edit(tmp_path, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"codes of lm_head.weight, which config.json ties"):
        pvrt.load(tmp_path)


def test_the_published_layout_keeps_its_lm_head(tmp_path: Path) -> None:
    """transformers 5 alone replaces lm_head by random weights: its list holds "lm_head.weight"."""
    dense = write_toy(tmp_path, "llama", published=True)
    skip = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "lm_head.weight" in skip["linear_weights_not_to_quantize"]
    assert "lm_head" not in skip["linear_weights_not_to_quantize"]
    model = pvrt.load(tmp_path, dtype=torch.float32)
    assert type(model.lm_head) is torch.nn.Linear
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_layouts_of_the_hub_load_in_any_type(tmp_path: Path, layout: str) -> None:
    """Tensors that transformers renames while it loads, of experts say, among them."""
    dense = write_published(tmp_path, layout, "2x8g8")
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.inference_mode():
        loaded = pvrt.load(tmp_path, dtype=torch.float32)
        torch.testing.assert_close(loaded(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
        loaded = pvrt.load(tmp_path, dtype=torch.bfloat16)
        assert bool(torch.isfinite(loaded(ids).logits).all())


@pytest.mark.slow
def test_import_alone_teaches_transformers_and_stays_light(tmp_path: Path) -> None:
    write_toy(tmp_path, "llama", published=True)
    script = (
        "import sys, pvrt; assert 'torch' not in sys.modules, 'import pvrt is heavy'\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "AQLMLinear", run.stderr


@pytest.mark.slow
def test_importing_after_transformers_works_too(tmp_path: Path) -> None:
    write_toy(tmp_path, "llama", published=True)
    script = (
        "from transformers import AutoModelForCausalLM; import pvrt\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "AQLMLinear", run.stderr


def test_dense_loading_leaves_an_ordinary_model(tmp_path: Path) -> None:
    dense = write_toy(tmp_path, "qwen2")
    model = pvrt.load(tmp_path, dense=True)
    assert not quantized_layers(model)
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "dense")
    again = pvrt.load(tmp_path / "dense")
    torch.testing.assert_close(logits(again), logits(dense), rtol=1e-4, atol=1e-5)


def test_a_loaded_model_saves_the_same_layout(tmp_path: Path) -> None:
    write_toy(tmp_path / "a", "qwen2")
    model = pvrt.load(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    before = load_file(tmp_path / "a" / "model.safetensors")
    after = load_file(tmp_path / "b" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(logits(pvrt.load(tmp_path / "b")), logits(model))


def test_codebooks_train_through_a_loaded_model(tmp_path: Path) -> None:
    write_toy(tmp_path, "llama")
    model = pvrt.load(tmp_path)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, AQLMLinear)
    layer.codebooks.requires_grad_(True)
    model(PROMPT, labels=PROMPT).loss.backward()
    assert layer.codebooks.grad is not None
    assert layer.codebooks.grad.abs().sum() > 0
    assert layer.codes.grad is None


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_config_of_another_width_is_refused(tmp_path: Path) -> None:
    write_toy(tmp_path, "llama")
    wide = 2 * json.loads((tmp_path / "config.json").read_text())["intermediate_size"]
    edit(tmp_path, intermediate_size=wide)
    with pytest.raises(CheckpointError, match=r"codes makes .* config.json describes"):
        pvrt.load(tmp_path)


def test_a_config_of_fewer_layers_is_refused(tmp_path: Path) -> None:
    write_toy(tmp_path, "llama")
    edit(tmp_path, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"model.layers.1.*does not have"):
        pvrt.load(tmp_path)


def test_a_missing_dense_tensor_is_refused_and_not_invented(tmp_path: Path) -> None:
    write_toy(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing, first model.norm.weight"):
        pvrt.load(tmp_path)


def test_codes_out_of_range_are_refused_while_loading(tmp_path: Path) -> None:
    write_toy(tmp_path, "llama", "2x12g8")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.codes"][0, 0, 0] = 4096
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.codes holds code 4096"):
        pvrt.load(tmp_path)


def test_a_linear_refuses_groups_that_do_not_divide() -> None:
    from pvrt.format.scheme import Scheme

    with pytest.raises(ValueError, match="does not divide a weight of 8 x 12"):
        AQLMLinear(12, 8, Scheme.parse("2x8g8"))
