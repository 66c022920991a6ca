"""Requests that schemathesis makes up from a server's own OpenAPI document."""

from collections.abc import Mapping
from typing import Any

from tests.server.running import PATIENCE

Operation = tuple[str, str]


def try_operations(
    url: str, wanted: set[Operation] | None, examples: int, headers: Mapping[str, str]
) -> set[Operation]:
    """Call operations of a server, those wanted of all that it says to have, `examples` times each.

    Every answer must be below 500, and an error must have a message. Returns all that it has.
    """
    import hypothesis
    import schemathesis

    schema: Any = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    seen = set()
    for operation in (result.ok() for result in schema.get_all_operations()):
        name = operation.method.upper(), operation.path
        seen.add(name)
        if wanted is not None and name not in wanted:
            continue

        def check(case: Any) -> None:
            response = case.call(timeout=PATIENCE, headers=headers)
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert response.json()["error"]["message"]

        settings = hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        settings(hypothesis.given(case=operation.as_strategy())(check))()
    return seen
