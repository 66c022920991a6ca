"""vLLM's own embeddings and lm_head on AQLM weights: loading, splitting over ranks, refusing."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm import config as vllm_config
from vllm.lora.layers.utils import _get_lora_device
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_embedding

from pvrt.errors import CheckpointError, ServeError
from pvrt.format.aqlm import QuantizedLayer
from pvrt.format.config_block import quantization_config
from pvrt.format.scheme import Scheme
from pvrt.vllm_plugin.embedding import AQLMEmbeddingMethod
from pvrt.vllm_plugin.plugin import AQLMConfig
from pvrt_kernels import aqlm_dequantize
from pvrt_kernels.cpu import rounding
from tests.fixtures.instruction_sets import relative
from tests.fixtures.toy import random_layer, write_toy

VOCABULARY, HIDDEN = 200, 64  # vLLM pads to 256: with two ranks one holds 128 rows, the other 72
SCHEMES = ["2x8g8", "2x8g4", "1x12g8"]
UNSCALED = "1x12g8"
EMBEDDING, HEAD, PROJECTOR = "model.embed_tokens", "lm_head", "model.projector"


@pytest.fixture(autouse=True)
def current_config() -> Iterator[None]:
    with vllm_config.set_current_vllm_config(vllm_config.VllmConfig()):
        yield


def config(schemes: dict[str, str], tied: bool = False) -> AQLMConfig:
    """A checkpoint that has these layers in codes, and no others."""
    named = {name: Scheme.parse(text) for name, text in schemes.items()}
    made = AQLMConfig.from_config(quantization_config({}, [], named))
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.codes": scheme.codes_shape(HIDDEN if name == PROJECTOR else VOCABULARY, HIDDEN)
        for name, scheme in named.items()
    }
    shapes |= {f"{name}.in_scales": (HIDDEN,) for name in schemes if schemes[name] != UNSCALED}
    made.layers.read_ends(shapes, tied)
    return made


class Ranks:
    """Tensor parallelism without processes: vLLM is told to be one rank after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def be(self, rank: int, size: int) -> None:
        for name, value in (("rank", rank), ("world_size", size)):
            get = f"get_tensor_model_parallel_{name}"
            self.monkeypatch.setattr(vllm_embedding, get, lambda value=value: value)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    ranks = Ranks(monkeypatch)
    ranks.be(0, 1)
    return ranks


def embedding(quantised: AQLMConfig | None, vocabulary: int = VOCABULARY, **keywords: Any) -> Any:
    """As most models make it: without a name."""
    make = vllm_embedding.VocabParallelEmbedding
    types = {"params_dtype": torch.float32, "quant_config": quantised}
    return make(vocabulary, HIDDEN, **types, **keywords)


def lm_head(quantised: AQLMConfig | None) -> Any:
    types = {"params_dtype": torch.float32, "quant_config": quantised}
    return vllm_embedding.ParallelLMHead(VOCABULARY, HIDDEN, prefix=HEAD, **types)


def source(scheme: str, seed: int = 0) -> QuantizedLayer:
    """Random, and its columns scaled, but for one scheme."""
    layer = random_layer(Scheme.parse(scheme), VOCABULARY, HIDDEN, seed=seed)
    return layer if scheme == UNSCALED else replace(layer, in_scales=torch.rand(HIDDEN) + 0.5)


def dense(tensors: QuantizedLayer) -> torch.Tensor:
    weight = aqlm_dequantize(tensors.codes, tensors.codebooks, tensors.scales)
    return weight if tensors.in_scales is None else weight * tensors.in_scales


def load(into: Any, tensors: QuantizedLayer, skip: str = "") -> Any:
    for name, tensor in tensors.named("layer"):
        part = name.removeprefix("layer.")
        if part != skip:
            parameter = getattr(into, part)
            parameter.weight_loader(parameter, tensor)
    into.quant_method.process_weights_after_loading(into)
    return into


def rows(of: Any, tokens: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = of.quant_method.embedding(of, tokens)
    return found


def logits(of: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = of.quant_method.apply(of, x)
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1, 2])
def test_ranks_hold_the_rows_of_their_tokens(scheme: str, size: int, ranks: Ranks) -> None:
    tensors, found = source(scheme), []
    for rank in range(size):
        ranks.be(rank, size)
        made = load(embedding(config({EMBEDDING: scheme})), tensors)
        found.append(rows(made, torch.arange(made.shard_indices.num_org_elements)[None])[0])
    torch.testing.assert_close(torch.cat(found), dense(tensors))


@pytest.mark.parametrize("scheme", [*SCHEMES, "2x8g8o4"])
@pytest.mark.parametrize("size", [1, 2])
def test_logits_are_those_of_the_dense_head_and_zero_beyond_the_vocabulary(
    scheme: str, size: int, ranks: Ranks
) -> None:
    tensors, x, found = source(scheme), torch.randn(3, HIDDEN), []
    for rank in range(size):
        ranks.be(rank, size)
        found.append(logits(load(lm_head(config({HEAD: scheme})), tensors), x))
    together, expected = torch.cat(found, -1), x @ dense(tensors).T
    assert relative(together[:, :VOCABULARY], expected) < rounding.relative_error()
    assert not together[:, VOCABULARY:].any()


def test_a_head_that_is_decoded_is_named(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    head = lm_head(config({HEAD: "2x8g8o4"}))
    del head.prefix  # vLLM 0.30 gives it none
    with caplog.at_level("WARNING", "vllm.pvrt"):
        load(head, source("2x8g8o4"))
    assert f"{HEAD} takes" in caplog.text


def test_scaled_columns_in_a_block_are_refused() -> None:
    made = config({HEAD: "2x8g8"})
    with pytest.raises(ServeError, match=r"^model.layers.0.q_proj.in_scales: vLLM can scale"):
        made.layers.read_ends({"model.layers.0.q_proj.in_scales": (HIDDEN,)}, tied=False)


def test_scaled_columns_are_refused_where_one_scheme_has_all_layers() -> None:
    made = AQLMConfig.from_config(quantization_config({"q_proj": Scheme.parse("2x8g8")}, []))
    with pytest.raises(ServeError, match=r"^lm_head.in_scales: .* must list the layers"):
        made.layers.read_ends({f"{HEAD}.in_scales": (HIDDEN,)}, tied=False)


def test_embedding_and_head_have_schemes_of_their_own(ranks: Ranks) -> None:
    made, x = config({EMBEDDING: "2x8g4", HEAD: "3x8g8"}), torch.randn(3, HIDDEN)
    table, weight = source("2x8g4"), source("3x8g8", seed=1)
    embed, head = embedding(made), lm_head(made)
    torch.testing.assert_close(rows(load(embed, table), torch.arange(9)), dense(table)[:9])
    found = logits(load(head, weight), x)[:, :VOCABULARY]
    assert relative(found, x @ dense(weight).T) < rounding.relative_error()


@pytest.mark.parametrize("by_attribute", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_head_multiplies_by_the_embeddings(
    scheme: str, by_attribute: bool, ranks: Ranks
) -> None:
    made, tensors, x = (
        config({EMBEDDING: scheme}, tied=True),
        source(scheme),
        torch.randn(3, HIDDEN),
    )
    embed, head = embedding(made), lm_head(made)
    if by_attribute:  # as K2 Horizon does
        head.weight = embed.weight
    else:
        head = head.tie_weights(embed)
    load(embed, tensors)
    head.quant_method.process_weights_after_loading(head)
    found = logits(head, x)[:, :VOCABULARY]
    assert relative(found, x @ dense(tensors).T) < rounding.relative_error()
    torch.testing.assert_close(rows(embed, torch.arange(9)), dense(tensors)[:9])
    held = [name for part in (embed, head) for name, _ in part.named_parameters()]
    assert len(held) == len(set(held))  # one copy: codes, or packed, or decoded


def test_a_head_that_is_not_tied_after_all_is_refused(ranks: Ranks) -> None:
    head = lm_head(config({EMBEDDING: "2x8g4"}, tied=True))
    head.quant_method.context.layers.end("", False, (VOCABULARY, HIDDEN))
    with pytest.raises(CheckpointError, match=r"ties lm_head to embeddings in codes, which vLLM's"):
        head.quant_method.process_weights_after_loading(head)


@pytest.mark.parametrize("in_codes", [{HEAD: "2x8g8"}, {EMBEDDING: "2x8g8", HEAD: "2x8g8"}])
def test_codes_of_a_head_that_is_tied_are_refused(in_codes: dict[str, str], ranks: Ranks) -> None:
    made = config(in_codes, tied=True)
    embed = embedding(made)
    with pytest.raises(CheckpointError, match=r"ties lm_head to embeddings that are"):
        lm_head(made).tie_weights(embed)


@pytest.mark.parametrize("part", ["codes", "codebooks", "scales"])
def test_a_missing_tensor_is_refused_by_its_name(part: str, ranks: Ranks) -> None:
    with pytest.raises(CheckpointError, match=f"lacks {EMBEDDING}.{part}, needed"):
        load(embedding(config({EMBEDDING: "2x8g8"})), source("2x8g8"), skip=part)


def test_groups_that_do_not_divide_are_refused(ranks: Ranks) -> None:
    with pytest.raises(CheckpointError, match="groups of 2x8g8o16 do not divide its 200 x 64"):
        lm_head(config({HEAD: "2x8g8o16"}))
    with pytest.raises(CheckpointError, match=f"{EMBEDDING}: 2x8g8o4 spans several rows"):
        embedding(config({EMBEDDING: "2x8g8o4"}))
    ranks.be(0, 2)
    with pytest.raises(ServeError, match="cannot be split into 128 rows"):
        lm_head(config({HEAD: "1x8g8o40"}))


# ---- which layer is in codes


def test_a_model_that_hands_no_configuration_gets_its_embedding_in_codes(ranks: Ranks) -> None:
    made = config({EMBEDDING: "2x8g4"})
    with vllm_config.set_current_vllm_config(with_quantisation(made)):
        assert isinstance(embedding(None).quant_method, AQLMEmbeddingMethod)
    other = embedding(None)  # of a model with no such configuration, in the same process
    assert isinstance(other.quant_method, vllm_embedding.UnquantizedEmbeddingMethod)


def with_quantisation(made: AQLMConfig) -> vllm_config.VllmConfig:
    current = vllm_config.VllmConfig()
    current.quant_config = made
    return current


def test_embeddings_of_another_shape_stay_dense(ranks: Ranks) -> None:
    made = config({EMBEDDING: "2x8g4"})
    positions = embedding(made, VOCABULARY + 1)
    assert isinstance(positions.quant_method, vllm_embedding.UnquantizedEmbeddingMethod)
    assert isinstance(lm_head(made).quant_method, vllm_embedding.UnquantizedEmbeddingMethod)


def test_a_name_decides_before_the_shape(ranks: Ranks) -> None:
    made = config({EMBEDDING: "2x8g4", "model.other_tokens": "3x8g8"})
    named = embedding(made, prefix="model.other_tokens")
    assert named.quant_method.end.scheme == Scheme.parse("3x8g8")
    with pytest.raises(ServeError, match=r"embed_tokens and model.other_tokens have"):
        embedding(made)


def test_codes_that_no_layer_took_are_refused_by_name(ranks: Ranks) -> None:
    made = config({EMBEDDING: "2x8g4", PROJECTOR: "2x8g8"})
    with pytest.raises(ServeError, match=r"holds codes for model.projector, which vLLM's model"):
        load(embedding(made), source("2x8g4"))


class Mapper:
    """As vLLM's: it maps names of tensors."""

    def apply_list(self, names: list[str]) -> list[str]:
        prefixes = {"lm_head.": "language_model.lm_head.", "model.": "language_model.model."}
        return [
            next((new + n.removeprefix(old) for old, new in prefixes.items() if n.startswith(old)))
            for n in names
        ]


def test_embeddings_follow_a_model_that_renames_its_modules(ranks: Ranks) -> None:
    made = config({EMBEDDING: "2x8g4", HEAD: "3x8g8"})
    made.apply_vllm_mapper(Mapper())
    assert embedding(made).quant_method.end.name == f"language_model.{EMBEDDING}"
    head = vllm_embedding.ParallelLMHead(
        VOCABULARY, HIDDEN, quant_config=made, prefix="language_model.lm_head"
    )
    assert head.quant_method.end.scheme == Scheme.parse("3x8g8")
    assert not made.layers._unused


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_codes_in_the_files_decide(tmp_path: Path, architecture: str, ranks: Ranks) -> None:
    for embeddings in ("2x8g4", None):
        folder = tmp_path / str(embeddings)
        model = write_toy(folder, architecture, embeddings=embeddings)
        block = json.loads((folder / "config.json").read_text())["quantization_config"]
        made = AQLMConfig.from_config(block)
        made.maybe_update_config(str(folder), hf_config=model.config)
        vocabulary, hidden = model.config.vocab_size, model.config.hidden_size
        for make in (vllm_embedding.VocabParallelEmbedding, vllm_embedding.ParallelLMHead):
            layer = make(vocabulary, hidden, params_dtype=torch.float32, quant_config=made)
            assert isinstance(layer.quant_method, AQLMEmbeddingMethod) == (embeddings is not None)


# ---- what stands in for a weight


def test_what_stands_in_for_a_weight_is_compared_and_never_computed_with(ranks: Ranks) -> None:
    embed = load(embedding(config({EMBEDDING: "2x8g4"})), source("2x8g4"))
    weight, other = embed.weight, torch.zeros(256, HIDDEN)
    assert weight.shape == (256, HIDDEN)
    assert (weight.dtype, weight.device) == (torch.float32, torch.device("cpu"))
    assert not torch.equal(weight.cpu(), other.cpu())
    assert not torch.equal(other, weight)
    with pytest.raises(ServeError, match=f"{EMBEDDING}: a part of vLLM wants this weight decoded"):
        torch.nn.functional.embedding(torch.tensor([1]), weight)
    with pytest.raises(ServeError, match="use a checkpoint that keeps it dense"):
        weight.t() @ torch.zeros(256)


def test_lora_finds_the_device_of_an_embedding(ranks: Ranks) -> None:
    embed = load(embedding(config({EMBEDDING: "2x8g4"})), source("2x8g4"))
    assert _get_lora_device(embed) == torch.device("cpu")
