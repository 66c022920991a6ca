"""Tools: what a request offers, how a model is told to call them, and grammars that make it call.

A model writes calls in the form that its chat template shows. Two forms are read here:
    Hermes (Qwen, Hermes, SmolLM3)   <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>
    Llama 3                          {"name": ..., "parameters": {...}}; ...
"""

import json
from dataclasses import dataclass
from typing import Any

from pvrt_server.engine.grammar import json_rule
from pvrt_server.errors import RequestError

# Templates with the mark of Hermes that show another form inside of it.
_NOT_HERMES = ("<function=", "<arg_key>", "<function_calls>")


@dataclass(frozen=True)
class ToolForm:
    """How calls are written: each between `begin` and `end`, or from the start of the answer on.

    arguments is the name of the field that holds them, separator what stands between two calls.
    """

    begin: str
    end: str
    arguments: str
    separator: str


HERMES = ToolForm("<tool_call>", "</tool_call>", "arguments", "\n")
LLAMA3 = ToolForm("", "", "parameters", "; ")


@dataclass(frozen=True)
class Function:
    """A function that the model may call; parameters is a JSON schema."""

    name: str
    parameters: dict[str, Any]
    strict: bool


@dataclass(frozen=True)
class Tools:
    """What one request offers. most_calls None is any number.

    must_call: the answer is calls and nothing else.
    """

    form: ToolForm
    functions: tuple[Function, ...]
    must_call: bool
    most_calls: int | None

    def grammar(self, content: dict[str, Any] | None) -> str | None:
        """A grammar (llguidance's Lark) for the answer; None where any text will do.

        content is the JSON schema of answers that are not calls, None for any text. Raises
        RequestError.
        """
        calls = "call"
        if self.most_calls != 1:
            calls = f"call ({json.dumps(self.form.separator)} call)*"
        if self.must_call:
            return f"start: {calls}\n{self._call_rules()}"
        if content is not None:
            answer = f"content: {json_rule(content, 'response_format')}\n"
            return f"start: content | {calls}\n{self._call_rules()}{answer}"
        if self.form.begin and any(function.strict for function in self.functions):
            # Free text, until it opens a call: lazy lexemes end at their first match.
            end = json.dumps(f"\n{self.form.end}")
            return (
                f'start: (opening "\\n" body {end})* TEXT\n'
                f"opening[lazy]: TEXT {json.dumps(self.form.begin)}\n"
                f"TEXT: /(.|\\n)*/\n{self._body_rules()}"
            )
        return None

    @property
    def rule_names(self) -> dict[str, str]:
        """What the rules of `grammar` stand for, in the words of the request."""
        names = {
            f"arguments_{number}": f"tools: the schema of {function.name!r}"
            for number, function in enumerate(self.functions)
        }
        return {**names, "content": "response_format"}

    def _call_rules(self) -> str:
        parts = ["body"]
        if self.form.begin:
            parts = [json.dumps(f"{self.form.begin}\n"), "body", json.dumps(f"\n{self.form.end}")]
        return f"call: {' '.join(parts)}\n{self._body_rules()}"

    def _body_rules(self) -> str:
        """Rules for {"name": ..., "arguments": ...}.

        Each schema has a rule of its own, so that its references start at its own root.
        """
        rules = []
        for number, function in enumerate(self.functions):
            head = f'{{"name": {json.dumps(function.name)}, "{self.form.arguments}": '
            arguments = json_rule(function.parameters, f"tools: {function.name!r}")
            rules += [
                f'body_{number}: {json.dumps(head)} arguments_{number} "}}"',
                f"arguments_{number}: {arguments}",
            ]
        bodies = " | ".join(f"body_{number}" for number in range(len(self.functions)))
        return "\n".join([f"body: {bodies}", *rules, ""])


def tool_form(template: str | None) -> ToolForm:
    """The form of calls that a chat template shows. Raises RequestError where it shows none."""
    if template and "tools" in template:
        if "<tool_call>" in template and not any(mark in template for mark in _NOT_HERMES):
            return HERMES
        if "<|python_tag|>" in template or '{"name": function name, "parameters":' in template:
            return LLAMA3
    known = template is not None and "tools" in template
    raise RequestError(
        "this model's chat template shows a form of tool calls that this engine does not read "
        "(it reads those of Hermes and Llama 3)"
        if known
        else "this model's chat template knows no tools",
        "tools",
        "unsupported_parameter",
    )
