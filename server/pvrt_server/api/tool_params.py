"""The fields of a request about tools and the form of the answer, and what they come to."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from pvrt_server.api.body import Body
from pvrt_server.api.tools import Function, Tools, offered, tool_form
from pvrt_server.errors import RequestError


class FunctionParams(Body):
    """`tools[i].function`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolParams(Body):
    """`tools[i]`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: FunctionParams


class ChosenFunction(Body):
    """`tool_choice.function`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str


class ToolChoice(Body):
    """`tool_choice` where it names one function."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Body):
    """`response_format.json_schema`. The schema is always enforced, strict or not."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    name: str | None = None
    description: str | None = None
    content: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """`response_format`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

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
        return {"type": "object"} if self.type == "json_object" else None


def offer(
    template: str | None,
    tools: list[ToolParams] | None,
    choice: Literal["none", "auto", "required"] | ToolChoice | None,
    parallel: bool | None,
) -> Tools | None:
    """The tools that a model may call; None where it must not, or there are none.

    Raises RequestError for a choice without tools, names that clash, and templates without tools.
    """
    if not tools:
        if choice not in (None, "none"):
            raise RequestError("tool_choice needs tools", "tool_choice")
        return None
    if choice == "none":
        return None
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError("two tools have one name", "tools")
    functions = [
        Function(f.name, f.parameters or {"type": "object"}, bool(f.strict))
        for f in (tool.function for tool in tools)
    ]
    wanted = choice.function.name if isinstance(choice, ToolChoice) else choice
    return offered(tool_form(template), functions, wanted, parallel is not False)
