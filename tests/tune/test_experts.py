"""Mixtures of experts: apart in tuning, published names on disk, a floor under rarely used ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import pvrt
from pvrt.errors import SourceError
from pvrt.format.aqlm import Checkpoint
from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt.modules.experts import ExpertList
from pvrt_tune.calibrate.block_tuning import Examples, finetune_block
from pvrt_tune.data.activations import Activations
from pvrt_tune.data.source_model import load_skeleton, load_source
from pvrt_tune.fit.layer import quantize_linear
from pvrt_tune.model_blocks import find_blocks, linears, observe
from pvrt_tune.model_calls import record_inputs
from pvrt_tune.pipeline import tune
from pvrt_tune.settings import FinetuneSettings, FitSettings, Recipe, TuneJob
from tests.fixtures.decoders import decoder
from tests.fixtures.toy import EXPERTS, toy_model, toy_tokenizer

QUICK = Recipe(
    scheme="2x8g4",
    samples=4,
    length=32,
    fit=FitSettings(rounds=1, kmeans_iterations=3, cg_iterations=3),
    finetune=FinetuneSettings(epochs=1),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    for name in EXPERTS:
        toy_model(name).save_pretrained(root / name)
        toy_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe"])
def mixture(request: pytest.FixtureRequest, folders: Path) -> tuple[str, Path]:
    """A mixture's name, and the folder of what it was tuned to."""
    out = folders / f"{request.param}-tuned"
    tune(TuneJob(str(folders / request.param), out, QUICK), lambda line: None)
    return request.param, out


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_apart_compute_what_fused_ones_do(folders: Path, name: str) -> None:
    fused = AutoModelForCausalLM.from_pretrained(folders / name)
    apart = load_source(str(folders / name)).dense()
    assert any(isinstance(module, ExpertList) for module in apart.modules())
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(apart(tokens).logits, fused(tokens).logits)


def test_experts_are_written_as_published(folders: Path, mixture: tuple[str, Path]) -> None:
    name, out = mixture
    checkpoint = Checkpoint.open(out)
    checkpoint.verify()
    published = set(stored_names(folders / name))
    inside = "block_sparse_moe.experts.3.w1" if name == "mixtral" else "mlp.experts.3.gate_proj"
    assert f"model.layers.1.{inside}" in checkpoint.layers
    assert {f"{layer}.weight" for layer in checkpoint.layers} <= published
    router = "block_sparse_moe.gate" if name == "mixtral" else "mlp.gate"
    assert f"model.layers.0.{router}.weight" in checkpoint.tensors
    skipped = checkpoint.config["quantization_config"]["linear_weights_not_to_quantize"]
    assert f"model.layers.0.{router}.weight" in skipped
    if name == "qwen2_moe":
        assert "model.layers.0.mlp.shared_expert_gate.weight" in checkpoint.tensors
        assert "model.layers.0.mlp.shared_expert.gate_proj" in checkpoint.layers


def test_a_quantised_mixture_loads_and_follows_its_original(
    folders: Path, mixture: tuple[str, Path]
) -> None:
    name, out = mixture
    dense = AutoModelForCausalLM.from_pretrained(folders / name)
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    model = pvrt.load(out)
    expert = model.model.layers[0].mlp.experts.get_submodule("1")
    assert all(isinstance(module, AQLMLinear) for module in expert.values())
    with torch.inference_mode():
        original, tuned = dense(tokens).logits, model(tokens).logits
    agreement = torch.nn.functional.cosine_similarity(original, tuned, dim=-1).mean()
    assert agreement > 0.9  # unrelated models agree to about 0


def stored_names(folder: Path) -> list[str]:
    from pvrt.format.aqlm import read_tensors

    return list(read_tensors(folder))


class Routed(nn.Module):
    """A block whose tokens all go to expert 0, but for `rare` of them that go to expert 1."""

    def __init__(self, experts: ExpertList, rare: int) -> None:
        super().__init__()
        self.experts, self.rare = experts, rare

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        index = torch.zeros(len(flat), 1, dtype=torch.int64)
        index[: self.rare] = 1
        output: torch.Tensor = self.experts(flat, index, torch.ones(len(flat), 1))
        return output.view(hidden.shape)


@pytest.mark.parametrize("rare", [0, 20])
def test_a_rarely_used_expert_gets_the_moment_of_all(folders: Path, rare: int) -> None:
    source = load_source(str(folders / "mixtral"))
    model = source.dense()
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(1, 300, 128, generator=torch.Generator().manual_seed(1))
    block = Routed(experts, rare)
    moments = observe(block, Activations(hidden, 1, "cpu"), [{}] * len(hidden))
    x = hidden[0]
    everything = x.T @ x / 300
    torch.testing.assert_close(moments["experts.2.w1"], everything)  # saw no token
    few = x[:rare].T @ x[:rare] + (128 - rare) * everything
    torch.testing.assert_close(moments["experts.1.w3"], few / 128)
    many = x[rare:].T @ x[rare:] / (300 - rare)  # more than 128: its own tokens only
    torch.testing.assert_close(moments["experts.0.w1"], many)
    assert set(moments) == {name for name, _ in linears(block)}


def test_few_windows_still_tune_every_expert(tmp_path: Path, folders: Path) -> None:
    recipe = replace(QUICK, samples=1, length=8)
    checkpoint = tune(
        TuneJob(str(folders / "mixtral"), tmp_path / "out", recipe), lambda line: None
    )
    experts = [name for name in checkpoint.layers if ".experts." in name]
    assert len(experts) == 2 * 4 * 3


def test_fused_experts_in_an_order_of_their_own_are_named(tmp_path: Path) -> None:
    """A tensor that would fit, but is not what the model has under this name."""
    decoder("gpt_oss").save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored[name] = stored[name].transpose(1, 2).contiguous()
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=rf"{name} has shape .*, config.json asks for"):
        load_skeleton(str(tmp_path))


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe"])
def test_fused_experts_are_tuned_load_and_are_decoded(tmp_path: Path, name: str) -> None:
    model = decoder(name)
    model.save_pretrained(tmp_path / "dense")
    toy_tokenizer().save_pretrained(tmp_path / "dense")
    recipe = replace(QUICK, embeddings="keep", training=None)
    checkpoint = tune(TuneJob(str(tmp_path / "dense"), tmp_path / "out", recipe), lambda line: None)
    inside = "mlp.experts.3.up_proj" if name == "gpt_oss" else "block_sparse_moe.experts.3.up_proj"
    assert f"model.layers.1.{inside}" in checkpoint.layers
    assert not any("router" in layer for layer in checkpoint.layers)
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model(tokens).logits
        decoded = pvrt.load(tmp_path / "out", dense=True)(tokens).logits
        torch.testing.assert_close(pvrt.load(tmp_path / "out")(tokens).logits, decoded)
    assert float((decoded - wanted).norm() / wanted.norm()) < 0.7  # of other models: 1.4


def test_block_tuning_moves_codes_of_experts_that_few_tokens_reach(folders: Path) -> None:
    """One token a batch: most experts are in no batch."""
    source = load_source(str(folders / "mixtral"))
    block = source.load("model.layers.0", "cpu", torch.float32)
    tokens = torch.arange(2).view(2, 1)
    hidden, targets = (Activations(torch.zeros(2, 1, 128), 1, "cpu") for _ in range(2))
    blocks = find_blocks(source.model)
    model = source.partial(source.outside(blocks.name), "cpu")
    arguments = record_inputs(model, blocks, tokens, 1, hidden)[0]
    moments = observe(block, hidden, arguments, targets)
    for name, linear in list(linears(block)):
        generator = torch.Generator().manual_seed(0)
        made = quantize_linear(linear, moments[name], QUICK, generator, torch.float32)
        block.set_submodule(name, made.module)
    settings = FinetuneSettings(epochs=1, move_codes=True)
    examples = Examples(hidden, targets, arguments)
    generator = torch.Generator().manual_seed(0)
    finetune_block(block, examples, settings, torch.float32, generator)
    assert not any(m.all_compute for m in block.modules() if isinstance(m, ExpertList))
