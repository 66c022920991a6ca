"""What vLLM is told of a chat template, and that it then does as the embedded engine."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from pvrt_server.capacity import installed_vllm
from pvrt_server.engine.loading import load_codec
from pvrt_server.opened import open_model
from pvrt_server.options import ServeOptions
from pvrt_server.vllm.chat_flags import chat_flags
from pvrt_server.vllm.reasoning_parser import _FAMILIES, reasoning_parser
from tests.fixtures.toy import write_toy
from tests.server.running import PATIENCE, vllm_serving

#: Ends turns with a token that is no EOS of the checkpoint.
TURNS = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|done|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
#: Opens the thought; lets a request turn it off.
SWITCH = TURNS.replace(
    "<|assistant|>",
    "<|assistant|><think>\n{% if enable_thinking is false %}\n</think>\n\n{% endif %}",
)
OPENS = TURNS.replace("<|assistant|>", "<|assistant|><think>\n")
CUTS = TURNS.replace("message.content", "message.content.split('</think>')[-1]")


def chatty(folder: Path, template: str, *tokens: str) -> Path:
    """A toy checkpoint with a template of its own, whose tokenizer has more tokens."""
    write_toy(folder, published=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """A vLLM that has three parsers."""
    (tmp_path / "vllm" / "reasoning").mkdir(parents=True)
    names = '"qwen3": ("a", "B"), "deepseek_r1": ("c", "D"), "glm45": ("e", "F")'
    (tmp_path / "vllm" / "reasoning" / "__init__.py").write_text(f"_PARSERS = {{{names}}}")
    return tmp_path / "vllm"


@pytest.mark.parametrize(
    ("template", "tokens", "kind", "parser"),
    [
        (SWITCH, ["<think>", "</think>"], "llama", "qwen3"),
        (OPENS, ["<think>", "</think>"], "qwen2", "deepseek_r1"),
        (OPENS, ["<think>", "</think>"], "glm4_moe", "glm45"),
        (OPENS, ["<think>", "</think>"], "olmo3", None),  # not in this vLLM
        (CUTS, ["<think>", "</think>"], "llama", None),  # perhaps the model never thinks
        (OPENS, ["<think>"], "llama", None),  # vLLM would end: it looks for both tokens
        (TURNS, ["<think>", "</think>"], "llama", None),
    ],
)
def test_the_parser_of_thoughts_follows_the_template(
    tmp_path: Path, registry: Path, template: str, tokens: list[str], kind: str, parser: str | None
) -> None:
    codec = load_codec(chatty(tmp_path / "toy", template, "<|done|>", *tokens))
    assert reasoning_parser(codec, kind, registry) == parser


def test_every_parser_of_thoughts_is_one_of_the_installed_vllm() -> None:
    folder = installed_vllm()
    if folder is None:
        pytest.skip("vLLM is not installed")
    known = (folder / "reasoning" / "__init__.py").read_text(encoding="utf-8")
    names = ["qwen3", "deepseek_r1", *(name for _, name in _FAMILIES)]
    assert [name for name in names if f'"{name}"' not in known] == []


def test_the_end_of_a_turn_joins_the_ends_of_the_checkpoint(
    tmp_path: Path, registry: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, scratch = chatty(tmp_path / "toy", TURNS, "<|done|>"), tmp_path / "scratch"
    scratch.mkdir()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "top_p": 0.9}))
    opened = open_model(folder)
    flags = chat_flags(opened, ServeOptions(), registry, scratch)
    assert flags == ["--generation-config", str(scratch)]
    codec = load_codec(folder)
    given = json.loads((scratch / "generation_config.json").read_text())
    assert given == {"eos_token_id": sorted([5, 257, codec.end_of_turn or -1]), "top_p": 0.9}
    assert "answers end at <|done|>" in caplog.text
    for own in ("--generation-config=vllm", "--chat-template=x"):
        assert chat_flags(opened, ServeOptions(extra=(own,)), registry, scratch) == []


def test_nothing_is_said_of_what_vllm_finds_itself(tmp_path: Path, registry: Path) -> None:
    write_toy(tmp_path / "toy", published=True)
    opened = open_model(tmp_path / "toy")
    assert chat_flags(opened, ServeOptions(), registry, tmp_path) == []


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_keeps_thoughts_apart_and_ends_at_the_end_of_a_turn(tmp_path: Path) -> None:
    folder = chatty(tmp_path / "toy", SWITCH, "<|done|>", "<think>", "</think>")
    done, close = (load_codec(folder).encode(mark)[-1] for mark in ("<|done|>", "</think>"))
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form = {"type": "json_schema", "json_schema": {"name": "m", "schema": schema}}

    with vllm_serving(folder, tmp_path / "log") as target:

        def ask(**more: Any) -> Any:
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, **more}
            url = f"{target.url}/v1/chat/completions"
            answer = httpx.post(url, json={"temperature": 0, **body}, timeout=PATIENCE)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]

        ended = ask(logit_bias={str(done): 100})
        assert (ended["finish_reason"], ended["message"]["content"]) == ("stop", None)
        thinks = ask(response_format=form, logit_bias={str(close): -100, str(done): -100})
        assert thinks["message"]["reasoning"]
        assert not thinks["message"]["content"]
        off = {"chat_template_kwargs": {"enable_thinking": False}}
        answers = ask(response_format=form, **off)
        assert answers["message"]["content"].startswith("{")
        assert not answers["message"].get("reasoning")
