"""Which of vLLM's reasoning parsers takes a model's thoughts apart from its answers.

vLLM's parsers look for the tokens of their marks in the vocabulary, and end the server where they
are not there.
"""

from pathlib import Path

from pvrt_server.api.reasoning import thought_of
from pvrt_server.engine.text import TextCodec

_MARKS = {"<think>", "</think>"}
_HELLO = [{"role": "user", "content": "Hello"}]
#: (model_type prefix, parser) of families whose thoughts have rules of their own.
_FAMILIES: tuple[tuple[str, str], ...] = (
    ("deepseek_v3", "deepseek_v3"),
    ("ernie4_5", "ernie45"),
    ("glm4", "glm45"),
    ("hunyuan", "hunyuan_a13b"),
    ("kimi", "kimi_k2"),
    ("minimax", "minimax_m2"),
    ("nemotron", "nemotron_v3"),
    ("olmo3", "olmo3"),
    ("step3", "step3"),
)


def reasoning_parser(codec: TextCodec, model_type: str, vllm: Path) -> str | None:
    """The parser for the chat template of a tokenizer, or None where there is no <think>, where a
    template leaves open whether the model thinks, or where this vLLM lacks the parser.

    vllm is the folder of the installed package; its list is read as text, as for tool parsers.
    """
    template = codec.template() or ""
    if not any(mark in template for mark in _MARKS):
        return None
    if not codec.tokenizer.get_vocab().keys() >= _MARKS:
        return None
    registry = vllm / "reasoning" / "__init__.py"
    known = registry.read_text(encoding="utf-8") if registry.is_file() else ""
    name = _parser(codec, template, model_type)
    return name if name is not None and f'"{name}"' in known else None


def _parser(codec: TextCodec, template: str, model_type: str) -> str | None:
    for prefix, name in _FAMILIES:
        if model_type.startswith(prefix):
            return name
    if "enable_thinking" in template:
        return "qwen3"  # whatever the architecture: thoughts unless a request turns them off
    opened = thought_of(codec, codec.encode_chat(_HELLO)) == "inside"
    return "deepseek_r1" if opened else None
