"""The real vLLM engine on a CPU against the dense model in transformers: equal greedy tokens.

A small part of benchmarks/vllm_equality.py. An engine takes seconds, so all of
this is two processes of vLLM, one of them with two ranks.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.fixtures.greedy import assert_greedy
from tests.fixtures.published import write_published
from tests.fixtures.toy import toy_tokenizer, write_toy
from tests.fixtures.vllm_extras import write_adapter
from tests.fixtures.vllm_generate import Job, each_result

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPTS = [[256, 10, 20, 30], [256, 1, 2, 3, 4, 5, 6, 7, 8], [256, 99]]
MAX_TOKENS = 16
LONG = [[256, *range(100, 180)], [256, *range(100, 170), 5, 6, 7]]  # two blocks of 32 in common
MISSING = "model.layers.1.self_attn.k_proj.codebooks"
Case = tuple[Job, Any]  # and the dense model that has to choose the same tokens


def llama(folder: Path) -> Case:
    return Job(str(folder)), write_published(folder, "llama-2", "2x8g8")


def phi(folder: Path) -> Case:
    """Stored fused: one codebook set for q, k and v."""
    return Job(str(folder)), write_published(folder, "phi-3", "2x8g8")


def tied(folder: Path) -> Case:
    return Job(str(folder)), write_published(folder, "llama-3.2", "1x16g8", short_list=True)


def mixtral(folder: Path) -> Case:
    return Job(str(folder)), write_published(folder, "mixtral", "2x8g8")


def biases_decoded(folder: Path) -> Case:
    return Job(str(folder), packed=False), write_toy(folder, "qwen2", "1x12g8")


def blocks_of_outputs(folder: Path) -> Case:
    return Job(str(folder), packed=True), write_toy(folder, "llama", "2x8g8o4")


MIXED = {"q_proj": "3x8g8", "v_proj": "4x8g8", "up_proj": "2x8g4", "down_proj": "1x16g8"}
ENDS = {"embed_tokens": "2x8g4", "lm_head": "3x8g4"}


def codes_everywhere(folder: Path) -> Case:
    """Layers of several schemes, some of them fused, and embeddings in codes that are tied."""
    schemes = {**MIXED, "embed_tokens": "2x8g4"}
    return Job(str(folder)), write_published(folder, "llama-3.2", "2x8g8", schemes=schemes)


def mixed_experts(folder: Path) -> Case:
    """vLLM's Mixtral does not tell its embedding of the checkpoint's configuration."""
    schemes = {"v_proj": "4x8g8", ".w2": "3x8g8", **ENDS}
    return Job(str(folder)), write_published(folder, "mixtral", "2x8g8", schemes=schemes)


def drafted(folder: Path) -> tuple[Job, Any, Path]:
    """A target with a draft model, which is still to be written."""
    draft = folder.with_name(f"{folder.name}_draft")
    guesses = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
    model = write_published(folder, "llama-2", "2x8g8", schemes={**MIXED, **ENDS})
    return Job(str(folder), engine={"speculative_config": guesses}), model, draft


def drafted_in_codes(folder: Path) -> Case:
    """The draft model is the same checkpoint, in a folder of its own."""
    job, model, draft = drafted(folder)
    shutil.copytree(folder, draft)
    return job, model


def drafted_dense(folder: Path) -> Case:
    """The draft model is the same model with nothing in codes."""
    job, model, draft = drafted(folder)
    model.save_pretrained(draft)
    toy_tokenizer().save_pretrained(draft)
    return job, model


def adapted(folder: Path) -> Case:
    """A LoRA adapter on quantised layers, answered as if it were merged."""
    model = write_published(folder, "llama-2", "2x8g8")
    write_adapter(folder / "adapter", model, ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
    engine = {"enable_lora": True, "max_lora_rank": 8}
    return Job(str(folder), engine=engine, lora=str(folder / "adapter")), model


def cached_chunked_and_guessed(folder: Path) -> Case:
    """Prompts in chunks of 32 tokens, once from the cache, with tokens guessed from n-grams."""
    engine = {
        "enable_prefix_caching": True,
        "block_size": 32,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 4,
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 2,
            "prompt_lookup_min": 1,
        },
    }
    model = write_published(folder, "mixtral", "2x8g8")
    return Job(str(folder), engine=engine, prompts=LONG, rounds=2), model


CASES: list[Callable[[Path], Case]] = [
    llama,
    phi,
    tied,
    mixtral,
    biases_decoded,
    blocks_of_outputs,
    codes_everywhere,
    mixed_experts,
    drafted_in_codes,
    drafted_dense,
    adapted,
    cached_chunked_and_guessed,  # last: vLLM starts no other engine once numba is loaded
]
ON_TWO_RANKS = [llama, codes_everywhere, mixed_experts]


def drop(folder: Path, name: str) -> Path:
    """The folder without one tensor."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop(name, None) is not None:
            save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {case.__name__: case(root / case.__name__) for case in CASES}


@pytest.fixture(scope="module")
def served(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of one vLLM for all cases, and for a checkpoint that lacks a tensor."""
    whole, broken = cases["llama"][0].folder, tmp_path_factory.mktemp("broken") / "llama"
    drop(shutil.copytree(whole, broken), MISSING)
    jobs = {
        "broken": Job(str(broken)),
        "dummy": Job(str(broken), engine={"load_format": "dummy"}),
        **{name: job for name, (job, _) in cases.items()},
    }
    results = each_result(list(jobs.values()), PROMPTS, max_tokens=MAX_TOKENS)
    return dict(zip(jobs, results, strict=True))


def assert_answers(job: Job, model: Any, result: dict[str, Any]) -> None:
    assert "tokens" in result, result["error"]
    for prompt, tokens in zip(job.prompts or PROMPTS, result["tokens"], strict=True):
        assert len(tokens) == MAX_TOKENS
        assert_greedy(model, prompt, tokens)


@pytest.mark.parametrize("name", [case.__name__ for case in CASES])
def test_vllm_continues_like_the_dense_model(
    name: str, cases: dict[str, Case], served: dict[str, Any]
) -> None:
    assert_answers(*cases[name], served[name])


def test_the_cache_and_the_guesses_were_used(served: dict[str, Any]) -> None:
    counters = served["cached_chunked_and_guessed"]["counters"]
    assert counters["vllm:prefix_cache_hits"] >= 64
    assert counters["vllm:spec_decode_num_draft_tokens"] > 0


@pytest.mark.parametrize("name", ["drafted_in_codes", "drafted_dense"])
def test_a_draft_model_that_is_the_target_guesses_right(name: str, served: dict[str, Any]) -> None:
    counters = served[name]["counters"]
    guessed = counters["vllm:spec_decode_num_draft_tokens"]
    assert counters["vllm:spec_decode_num_accepted_tokens"] > 0.8 * guessed > 0


def test_a_checkpoint_that_lacks_a_tensor_does_not_start(served: dict[str, Any]) -> None:
    error = served["broken"]["error"]
    assert error.startswith(f"CheckpointError: the checkpoint lacks {MISSING}, needed because")


def test_dummy_weights_start_without_any_tensor(served: dict[str, Any]) -> None:
    assert [len(tokens) for tokens in served["dummy"]["tokens"]] == [MAX_TOKENS] * len(PROMPTS)


def test_two_tensor_parallel_ranks_continue_like_the_dense_model(cases: dict[str, Case]) -> None:
    chosen = [cases[case.__name__] for case in ON_TWO_RANKS]
    jobs = [job for job, _ in chosen]
    for case, result in zip(
        chosen, each_result(jobs, PROMPTS, max_tokens=16, ranks=2), strict=True
    ):
        assert_answers(*case, result)
