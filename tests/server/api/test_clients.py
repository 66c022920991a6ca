"""Other clients than the official one, as their users call them.

They take seconds to import: the tests do it, not every process that collects them.
"""

from typing import Any

import openai
import pytest

from tests.server.running import Server

# LiteLLM's own models of requests.
quiet = pytest.mark.filterwarnings("ignore:Item '.*' on TypedDict class:UserWarning")
ANSWER = "one two three 😀 four"


def langchain(server: Server, **options: Any) -> Any:
    import langchain_openai

    return langchain_openai.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="toy", max_retries=0, **options
    )


def test_langchain_chats(says: Server) -> None:
    chat = langchain(says, stop=["four"])
    answer = chat.invoke([("system", "Be brief."), ("human", "Hello")])
    assert answer.content == "one two three 😀 "
    assert answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["finish_reason"] == "stop"


def test_langchain_streams(says: Server) -> None:
    chunks = list(langchain(says, stream_usage=True).stream("Hello"))
    assert "".join(chunk.content for chunk in chunks) == ANSWER
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) == 24


def test_langchain_completes(says: Server) -> None:
    import langchain_openai

    model = langchain_openai.OpenAI(
        base_url=f"{says.url}/v1", api_key="none", model="toy", max_retries=0
    )
    assert model.invoke("Hello") == ANSWER
    assert "".join(model.stream("Hello")) == ANSWER


def test_langchain_gets_structured_output(server: Server) -> None:
    schema = {
        "title": "pet",
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "maximum": 9}},
        "required": ["kind", "age"],
        "additionalProperties": False,
    }
    model = langchain(server, seed=2).with_structured_output(schema, method="json_schema")
    pet = model.invoke("A pet?")
    assert pet["kind"] in ("cat", "dog")
    assert pet["age"] <= 9


def test_langchain_raises_our_errors(says: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="between 0 and 2"):
        langchain(says, temperature=3).invoke("Hello")


@quiet
@pytest.mark.parametrize("stream", [False, True])
def test_litellm_chats(says: Server, stream: bool) -> None:
    import litellm

    answer = litellm.completion(
        model="openai/toy",
        api_base=f"{says.url}/v1",
        api_key="none",
        messages=[{"role": "user", "content": "Hello"}],
        stream=stream,
    )
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
    assert text == ANSWER


@quiet
def test_litellm_raises_our_errors(says: Server) -> None:
    import litellm

    with pytest.raises(litellm.NotFoundError, match="not served here"):
        litellm.completion(
            model="openai/other",
            api_base=f"{says.url}/v1",
            api_key="none",
            messages=[{"role": "user", "content": "Hello"}],
        )
