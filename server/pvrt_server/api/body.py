"""What all parts of requests are: models whose validation ends at the first error.

pydantic collects all errors: one for each item of a list, in each branch of a union. A list of a
hundred thousand numbers with a word in it took a minute, and gigabytes.
"""

from typing import Any, Self

from pydantic import BaseModel, GetCoreSchemaHandler, ModelWrapValidatorHandler, model_validator

#: Of one object that has fields of its own. Mappings (logit_bias, metadata) may have more.
MOST_FIELDS = 1000


def _end_at_first_error(schema: Any) -> None:
    """Set pydantic's fail_fast on every list and mapping of a schema that has it as an option."""
    if isinstance(schema, list | tuple):
        for part in schema:
            _end_at_first_error(part)
    elif isinstance(schema, dict):
        if schema.get("type") in ("list", "dict"):
            schema["fail_fast"] = True
        for part in schema.values():
            _end_at_first_error(part)


class Body(BaseModel):
    """A request, or a part of one that has fields of its own."""

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> Any:
        schema = handler(source)
        _end_at_first_error(schema)
        return schema

    @model_validator(mode="wrap")
    @classmethod
    def _bound_fields(cls, values: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(values, dict) and len(values) > MOST_FIELDS:
            raise ValueError(f"an object has {len(values)} fields; the most is {MOST_FIELDS}")
        return check(values)
