"""Embeddings in codes and the heads tied to them: on other devices, moved and copied."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import pvrt
from pvrt.format.scheme import Scheme
from pvrt.modules.aqlm_embedding import AQLMEmbedding, TiedHead
from pvrt.modules.aqlm_layer import pack
from tests.fixtures.simulated_device import NAME
from tests.fixtures.toy import random_layer, write_toy


def tokens() -> Tensor:
    return torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))


def logits(model: Any, device: str = "cpu") -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(tokens().to(device)).logits
    return found.cpu()


def tied(rows: int = 40, width: int = 64) -> tuple[AQLMEmbedding, TiedHead]:
    embedding = AQLMEmbedding(rows, width, Scheme.parse("2x8g8"), in_scales=True)
    stored = random_layer(embedding.scheme, rows, width)
    with torch.no_grad():
        for name in ("codes", "codebooks", "scales"):
            getattr(embedding, name).copy_(getattr(stored, name))
        assert embedding.in_scales is not None
        embedding.in_scales.uniform_(0.5, 1.5)
    embedding.requires_grad_(False)
    return embedding, TiedHead(embedding, nn.Parameter(torch.randn(rows)))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma"])
def test_a_device_computes_what_the_cpu_does(
    tmp_path: Path, architecture: str, dense: bool, device: str
) -> None:
    write_toy(tmp_path, architecture, embeddings="2x8g4")
    expected = logits(pvrt.load(tmp_path, dense=dense))
    moved = pvrt.load(tmp_path, dense=dense).to(device)
    torch.testing.assert_close(logits(moved, device), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma"])
def test_transformers_loads_embeddings_onto_a_device(
    tmp_path: Path, architecture: str, device: str
) -> None:
    write_toy(tmp_path, architecture, embeddings="2x8g4")
    expected = logits(pvrt.load(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": device})
    torch.testing.assert_close(logits(loaded, device), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_a_head_may_be_called_on_another_device(packed: bool, device: str) -> None:
    """A model that is spread over GPUs has its head, which holds no weight, on the last."""
    embedding, head = tied()
    x = torch.randn(3, 64)
    expected = head(x)
    if packed:
        pack([embedding], torch.float32)
    found = head.to(device)(x.to(device))
    assert found.device.type == NAME
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_a_copy_of_both_is_tied_to_itself() -> None:
    embedding, head = tied()
    copied = copy.deepcopy(nn.ModuleList([embedding, head]))
    other = copied[1]
    assert isinstance(other, TiedHead)
    assert other.embedding is copied[0] is not embedding
    with torch.no_grad():
        embedding.codebooks.zero_()
    x = torch.randn(3, 64)
    assert not torch.equal(other(x), head(x))
