"""The real vLLM engine on a CPU against the dense model in transformers: equal greedy tokens."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pvrt.checkpoint import WEIGHTS_FILE
from tests.fixtures.greedy import greedy
from tests.fixtures.toy import write_toy
from tests.fixtures.vllm_generate import Job, run_jobs, vllm_greedy

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

PROMPTS = [[256, 10, 20, 30], [256, 1, 2, 3, 4, 5, 6, 7, 8], [256, 99]]
MAX_TOKENS = 16
# name: architecture, scheme, published layout, packed (None: what pvrt does on this machine)
CHECKPOINTS: dict[str, tuple[str, str, bool, bool | None]] = {
    "llama as published": ("llama", "2x8g8", True, None),
    "llama packed": ("llama", "2x8g8", False, True),
    "llama decoded at load": ("llama", "2x8g8", False, False),
    "llama over blocks of outputs": ("llama", "2x8g8o4", False, True),
    "tied llama with 16-bit codes": ("llama-tied", "1x16g8", True, True),
    "qwen2 with biases": ("qwen2", "1x12g8", False, True),
    "phi3 stored fused": ("phi3", "2x8g8", False, True),
}
MISSING = "model.layers.1.self_attn.k_proj.codebooks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def dense(folder: Path) -> dict[str, list[list[int]]]:
    """Tokens of the dense models; writes the checkpoints."""
    expected = {}
    for name, (architecture, scheme, published, _) in CHECKPOINTS.items():
        model = write_toy(folder / name, architecture, scheme, published=published)
        expected[name] = greedy(model, PROMPTS, MAX_TOKENS)
    return expected


@pytest.fixture(scope="module")
def served(folder: Path, dense: dict[str, list[list[int]]]) -> dict[str, dict[str, Any]]:
    """Results of vLLM for all checkpoints, and for one that lacks a tensor."""
    broken = shutil.copytree(folder / "llama as published", folder / "broken")
    tensors = load_file(broken / WEIGHTS_FILE)
    del tensors[MISSING]
    save_file(tensors, broken / WEIGHTS_FILE, metadata={"format": "pt"})
    jobs = {name: Job(str(folder / name), row[3]) for name, row in CHECKPOINTS.items()}
    jobs["broken"] = Job(str(broken))
    jobs["dummy"] = Job(str(broken), engine={"load_format": "dummy"})
    results = run_jobs(list(jobs.values()), PROMPTS, max_tokens=MAX_TOKENS)
    return dict(zip(jobs, results, strict=True))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_vllm_continues_like_the_dense_model(
    name: str, dense: dict[str, list[list[int]]], served: dict[str, dict[str, Any]]
) -> None:
    assert served[name] == {"tokens": dense[name]}


def test_a_checkpoint_that_lacks_a_tensor_does_not_start(served: dict[str, dict[str, Any]]) -> None:
    error = served["broken"]["error"]
    assert error.startswith(f"CheckpointError: the checkpoint lacks {MISSING}, needed because")


def test_dummy_weights_start_without_any_tensor(served: dict[str, dict[str, Any]]) -> None:
    assert [len(tokens) for tokens in served["dummy"]["tokens"]] == [MAX_TOKENS] * len(PROMPTS)


def test_two_tensor_parallel_ranks_continue_like_the_dense_model(
    folder: Path, dense: dict[str, list[list[int]]]
) -> None:
    name = "llama as published"
    assert vllm_greedy(folder / name, PROMPTS, max_tokens=MAX_TOKENS, ranks=2) == dense[name]
