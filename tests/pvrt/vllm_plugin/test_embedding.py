"""vLLM's own embeddings and lm_head on AQLM weights: loading, splitting over ranks, refusing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm import config as vllm_config
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_embedding

from pvrt.errors import CheckpointError, ServeError
from pvrt.format.aqlm import QuantizedLayer
from pvrt.format.config_block import quantization_config
from pvrt.format.scheme import Scheme
from pvrt.vllm_plugin.embedding import AQLMEmbeddingMethod
from pvrt.vllm_plugin.plugin import AQLMConfig
from pvrt_kernels import aqlm_dequantize
from tests.fixtures.toy import random_layer, write_toy
from tests.fixtures.vllm_extras import quantise_ends

VOCABULARY, HIDDEN = 200, 64  # vLLM pads to 256: with two ranks one holds 128 rows, the other 72
SCHEMES = ["2x8g8", "1x12g8", "2x8g8o4"]


@pytest.fixture(autouse=True)
def current_config() -> Iterator[None]:
    with vllm_config.set_current_vllm_config(vllm_config.VllmConfig()):
        yield


def config(scheme: str, ends: set[str]) -> AQLMConfig:
    made = AQLMConfig.from_config(quantization_config({"model.layers": Scheme.parse(scheme)}, []))
    made.quantised_ends = ends
    return made


def layer(
    kind: str, scheme: str, monkeypatch: pytest.MonkeyPatch, rank: int = 0, ranks: int = 1
) -> Any:
    for name, value in (("rank", rank), ("world_size", ranks)):
        monkeypatch.setattr(
            vllm_embedding, f"get_tensor_model_parallel_{name}", lambda value=value: value
        )
    quantised = config(scheme, {"embed_tokens", "lm_head"})
    made = getattr(vllm_embedding, kind)
    return made(VOCABULARY, HIDDEN, params_dtype=torch.float32, quant_config=quantised)


def source(scheme: str) -> QuantizedLayer:
    return random_layer(Scheme.parse(scheme), VOCABULARY, HIDDEN)


def dense(tensors: QuantizedLayer) -> torch.Tensor:
    return aqlm_dequantize(tensors.codes, tensors.codebooks, tensors.scales)


def load(into: Any, tensors: QuantizedLayer, skip: str = "") -> Any:
    for name, tensor in tensors.named("layer"):
        part = name.removeprefix("layer.")
        if part != skip:
            parameter = getattr(into, part)
            parameter.weight_loader(parameter, tensor)
    into.quant_method.process_weights_after_loading(into)
    return into


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_hold_the_rows_of_their_tokens(
    scheme: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = source(scheme)
    rows = []
    for rank in range(ranks):
        made = load(layer("VocabParallelEmbedding", scheme, monkeypatch, rank, ranks), tensors)
        own = made.shard_indices.num_org_elements
        rows.append(made.quant_method.embedding(made, torch.arange(own)[None])[0])
    torch.testing.assert_close(torch.cat(rows), dense(tensors))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_logits_are_those_of_the_dense_head_and_zero_beyond_the_vocabulary(
    scheme: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, x = source(scheme), torch.randn(3, HIDDEN)
    logits = []
    for rank in range(ranks):
        head = load(layer("ParallelLMHead", scheme, monkeypatch, rank, ranks), tensors)
        logits.append(head.quant_method.apply(head, x))
    together = torch.cat(logits, -1)
    torch.testing.assert_close(together[:, :VOCABULARY], x @ dense(tensors).T)
    assert not together[:, VOCABULARY:].any()


def test_a_tied_head_multiplies_by_the_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, x = source("2x8g8"), torch.randn(3, HIDDEN)
    embeddings = layer("VocabParallelEmbedding", "2x8g8", monkeypatch)
    head = layer("ParallelLMHead", "2x8g8", monkeypatch).tie_weights(embeddings)
    load(embeddings, tensors)
    head.quant_method.process_weights_after_loading(head)
    logits = head.quant_method.apply(head, x)
    torch.testing.assert_close(logits[:, :VOCABULARY], x @ dense(tensors).T)


@pytest.mark.parametrize("part", ["codes", "codebooks", "scales"])
def test_a_missing_tensor_is_refused_by_its_name(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=f"lacks embed_tokens.{part}, needed"):
        load(layer("VocabParallelEmbedding", "2x8g8", monkeypatch), source("2x8g8"), skip=part)


def test_groups_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="groups of 2x8g8o16 do not divide its 200 x 64"):
        layer("ParallelLMHead", "2x8g8o16", monkeypatch)
    with pytest.raises(ServeError, match="cannot be split into 128 rows"):
        layer("ParallelLMHead", "1x8g8o40", monkeypatch, 0, 2)


@pytest.mark.parametrize(
    ("architecture", "ends"),
    [("llama", {"embed_tokens", "lm_head"}), ("llama-tied", {"embed_tokens", "lm_head"})],
)
def test_codes_in_the_files_decide(
    tmp_path: Path, architecture: str, ends: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_toy(tmp_path, architecture)
    block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    plain = AQLMConfig.from_config(block)
    plain.maybe_update_config(str(tmp_path), hf_config=model.config)
    assert plain.quantised_ends == set()
    quantise_ends(tmp_path, model, "2x8g8")
    plain.maybe_update_config(str(tmp_path), hf_config=model.config)
    assert plain.quantised_ends == ends
    made = layer("ParallelLMHead", "2x8g8", monkeypatch)
    assert isinstance(plain.get_quant_method(made, "lm_head"), AQLMEmbeddingMethod)
