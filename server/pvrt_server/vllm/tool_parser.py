"""Which of vLLM's tool-call parsers reads the calls that a model writes.

vLLM offers tools only with --enable-auto-tool-choice and the name of a parser. Templates show the
form of a call to the model, so the mark of that form in the template is the evidence; architectures
decide where several parsers share a mark.
"""

from pathlib import Path

#: (mark in the template, model_type prefixes or none for any, parser), the first match wins.
_PARSERS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("<start_function_call>", ("gemma",), "functiongemma"),
    ("<|tool_call>", ("gemma4",), "gemma4"),
    ("<|channel|>", ("gpt_oss",), "openai"),
    ("[TOOL_CALLS]", (), "mistral"),
    ("<|python_tag|>", ("llama4",), "llama4_json"),
    ("<|python_tag|>", (), "llama3_json"),
    ('{"name": function name, "parameters":', ("llama",), "llama3_json"),
    ("<minimax:tool_call>", (), "minimax_m2"),
    ("<arg_key>", ("glm",), "glm45"),
    ("<seed:tool_call>", (), "seed_oss"),
    ("<｜tool▁calls▁begin｜>", ("deepseek",), "deepseek_v3"),
    ("<|tool_calls_section_begin|>", (), "kimi_k2"),
    ("<|tool_call_start|>", ("lfm2",), "lfm2"),
    ("<|tool_call|>", ("phi",), "phi4_mini_json"),
    ("<|tool_call|>", ("granite",), "granite"),
    ("<tool_call>", ("granite",), "granite4"),
    ("<tool_calls>", ("jamba",), "jamba"),
    ("<function_calls>", ("olmo",), "olmo3"),
    ("<function=", (), "qwen3_coder"),
    ("<tool_call>", (), "hermes"),
)


def tool_parser(template: str | None, model_type: str, vllm: Path) -> str | None:
    """The parser for a chat template, or None where none is known or this vLLM lacks it.

    vllm is the folder of the installed package; its list is read as text, because importing it
    takes seconds.
    """
    if not template or "tools" not in template:
        return None
    registry = vllm / "tool_parsers" / "__init__.py"
    known = registry.read_text(encoding="utf-8") if registry.is_file() else ""
    for mark, families, name in _PARSERS:
        if mark in template and (not families or model_type.startswith(families)):
            return name if f'"{name}"' in known else None
    return None
