"""What lies beside the weights: everything of the original, in words that older readers know."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from transformers import AutoConfig, AutoTokenizer

from pvrt.errors import RunError
from pvrt_server.templates import chat_template
from pvrt_tune.pipeline import tune
from pvrt_tune.settings import TuneJob
from pvrt_tune.side_files import tokenizer_files
from tests.fixtures.decoders import DECODERS
from tests.fixtures.toy import CHAT_TEMPLATE, random_model, toy_tokenizer
from tests.tune.test_pipeline import QUICK

KEPT = replace(QUICK, embeddings="keep")
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
COPIED = {"preprocessor_config.json": "{}", "tokenizer.model": "spm", "LICENSE": "free"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("side")
    config = AutoConfig.for_model("llama", **DECODERS["nanochat"], rope_parameters=dict(ROPE))
    model = random_model(config)
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, True
    model.save_pretrained(root / "dense")
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = {
        "default": CHAT_TEMPLATE,
        "tool_use": f"{CHAT_TEMPLATE}{{# tools #}}",
    }
    tokenizer.save_pretrained(root / "dense")
    for name, content in COPIED.items():
        (root / "dense" / name).write_text(content)
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    job = TuneJob(str(root / "dense"), root / "out", KEPT, str(root / "text.txt"), "cpu")
    tune(job, lambda line: None)
    return root / "out"


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_all_chat_templates_are_written(out: Path) -> None:
    written = AutoTokenizer.from_pretrained(out).chat_template
    assert written == AutoTokenizer.from_pretrained(out.parent / "dense").chat_template
    assert set(written) == {"default", "tool_use"}
    assert (chat_template(out) or "").endswith("{# tools #}")


def test_files_of_other_readers_are_copied(out: Path) -> None:
    assert {name: (out / name).read_text() for name in COPIED} == COPIED


def test_version_4_of_transformers_finds_what_it_knows(out: Path) -> None:
    config, generation = read(out / "config.json"), read(out / "generation_config.json")
    assert config["rope_theta"] == ROPE["rope_theta"] and config["rope_scaling"] == ROPE
    assert AutoConfig.from_pretrained(out).rope_parameters == ROPE
    assert generation["temperature"] == 0.6 and None not in generation.values()
    tokenizer = read(out / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)
    special = toy_tokenizer().all_special_tokens
    assert AutoTokenizer.from_pretrained(out).all_special_tokens == special


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/tmp/x/tokenizer_config.json"),
        Exception("No space left on device (os error 28)"),  # tokenizers' own
    ],
)
def test_a_full_disk_under_the_tokenizer_is_a_sentence(error: Exception) -> None:
    tokenizer = Mock()
    tokenizer.save_pretrained.side_effect = error
    with pytest.raises(RunError, match=r"No space left on device.*TMPDIR") as refused:
        tokenizer_files(tokenizer)
    assert "\n" not in str(refused.value)
