"""Tool-call parsers by template, against the list of the installed vLLM."""

from pathlib import Path

import pytest

from pvrt_server.capacity import installed_vllm
from pvrt_server.vllm.tool_parser import _PARSERS, tool_parser

HERMES = "{% if tools %}<tool_call>\n{...}\n</tool_call>{% endif %}"


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """A vLLM that has three parsers."""
    (tmp_path / "tool_parsers").mkdir()
    names = '"hermes": ("a", "B"), "llama3_json": ("c", "D"), "qwen3_coder": ("e", "F")'
    (tmp_path / "tool_parsers" / "__init__.py").write_text(f"_TOOL_PARSERS = {{{names}}}")
    return tmp_path


def test_the_form_of_a_call_in_the_template_decides(registry: Path) -> None:
    assert tool_parser(HERMES, "qwen3", registry) == "hermes"
    assert tool_parser("{{ tools }}<tool_call><function=x>", "qwen3_5", registry) == "qwen3_coder"
    assert tool_parser("{{ tools }}<|python_tag|>", "llama", registry) == "llama3_json"


def test_no_parser_where_none_is_known(registry: Path, tmp_path: Path) -> None:
    assert tool_parser(None, "llama", registry) is None
    assert tool_parser("no t-word: <tool_call>", "qwen3", registry) is None
    assert tool_parser("{{ tools }}[TOOL_CALLS]", "mistral", registry) is None  # not in this vLLM
    assert tool_parser(HERMES, "qwen3", tmp_path / "elsewhere") is None


def test_every_parser_is_one_of_the_installed_vllm() -> None:
    folder = installed_vllm()
    if folder is None:
        pytest.skip("vLLM is not installed")
    known = (folder / "tool_parsers" / "__init__.py").read_text(encoding="utf-8")
    assert [name for _, _, name in _PARSERS if f'"{name}"' not in known] == []
