"""The fields of a request about tools and the form of the answer, and what they come to."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from pvrt_server.api.body import Body
from pvrt_server.api.tools import Function, Tools, tool_form
from pvrt_server.engine.text import TextCodec
from pvrt_server.errors import RequestError


class FunctionParams(Body):
    """`tools[i].function`. Other keys reach the template and change nothing else."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolParams(Body):
    """`tools[i]`. Some clients write strict beside the function."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["function"]
    function: FunctionParams
    strict: bool | None = Field(default=None, exclude=True)


class ChosenFunction(Body):
    """`tool_choice.function`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str


class ToolChoice(Body):
    """`tool_choice` where it names one function."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: ChosenFunction


class AllowedTools(Body):
    """`tool_choice.allowed_tools`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    mode: Literal["auto", "required"]
    tools: list[ToolChoice]


class AllowedChoice(Body):
    """`tool_choice` where it names several functions."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


AnyChoice = Literal["none", "auto", "required"] | ToolChoice | AllowedChoice


class JsonSchema(Body):
    """`response_format.json_schema`. The schema is always enforced, strict or not."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    name: str | None = None
    description: str | None = None
    content: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """`response_format`. A schema beside json_object is llama.cpp's way."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    content: dict[str, Any] | None = Field(default=None, alias="schema")

    def schema_to_follow(self) -> dict[str, Any] | None:
        """The JSON schema of the answer, None for any text. Raises RequestError."""
        if self.type == "json_schema":
            if self.json_schema is None or not isinstance(self.json_schema.content, dict):
                raise RequestError(
                    "response_format.json_schema.schema is missing; it is a JSON schema, an object",
                    "response_format",
                )
            return self.json_schema.content
        if self.json_schema is not None:
            raise RequestError(
                "response_format.json_schema needs type json_schema", "response_format"
            )
        return (self.content or {"type": "object"}) if self.type == "json_object" else None


def offer(
    codec: TextCodec,
    tools: list[ToolParams] | None,
    choice: AnyChoice | None,
    parallel: bool | None,
) -> Tools | None:
    """The tools that a model may call; None where it must not, or there are none.

    Raises RequestError for a choice without tools, names that clash, and templates without tools.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools", "tool_choice")
        return None
    if choice == "none":
        return None
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError("two tools have one name", "tools")
    wanted: str | None
    if isinstance(choice, AllowedChoice):
        wanted = choice.allowed_tools.mode
        allowed = [tool.function.name for tool in choice.allowed_tools.tools]
    elif isinstance(choice, ToolChoice):
        wanted, allowed = "required", [choice.function.name]
    else:
        wanted, allowed = choice, names
    if unknown := [name for name in allowed if name not in names]:
        raise RequestError(
            f"tool_choice names {unknown[0]!r}, which is not among the tools", "tool_choice"
        )
    functions = tuple(
        Function(f.name, f.parameters or {"type": "object"}, bool(f.strict or tool.strict))
        for tool in tools
        if (f := tool.function).name in allowed
    )
    single = parallel is False or isinstance(choice, ToolChoice) or codec.chat.one_call_a_turn
    form = tool_form(codec.template([{}]))
    return Tools(form, functions, wanted == "required", 1 if single else None)
