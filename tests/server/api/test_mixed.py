"""Clients of many kinds at once on one small server: all are answered, and nothing is left over."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest

from pvrt_server.engine.engine import Engine
from tests.server.running import PATIENCE, Server, serving, wait_until

ROUNDS = 3
HELLO: Any = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "m", "schema": SCHEMA}}


def chats(server: Server) -> None:
    with closing(server.client()) as client:
        chunks = client.chat.completions.create(
            model="toy", messages=HELLO, stream=True, max_tokens=9
        )
        assert list(chunks)[-1].choices[0].finish_reason in ("stop", "length")


def follows_a_schema(server: Server) -> None:
    with closing(server.client()) as client:
        options: Any = {"response_format": FORM, "max_tokens": 99}
        answer = client.chat.completions.create(model="toy", messages=HELLO, **options)
        assert answer.choices[0].message.content in ('{"ok": true}', '{"ok": false}')


def responds(server: Server) -> None:
    with closing(server.client()) as client:
        first = client.responses.create(model="toy", input="Hello", max_output_tokens=16)
        client.responses.create(
            model="toy", input="And?", max_output_tokens=16, previous_response_id=first.id
        )
        client.responses.delete(first.id)


def asks_at_once(server: Server) -> None:
    async def go() -> None:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=PATIENCE) as client:
            asked = (
                client.completions.create(model="toy", prompt=text, n=2, max_tokens=7)
                for text in ("a", "long " * 60)
            )
            assert [len(a.choices) for a in await asyncio.gather(*asked)] == [2, 2]

    asyncio.run(go())


def leaves(server: Server) -> None:
    with closing(server.client()) as client:
        stream = client.completions.create(model="toy", prompt="x", stream=True, max_tokens=400)
        next(iter(stream))
        stream.close()


def is_wrong(server: Server) -> None:
    with closing(server.client()) as client, pytest.raises(openai.BadRequestError, match="top_p"):
        client.chat.completions.create(model="toy", messages=HELLO, top_p=7)


def langchains(server: Server) -> None:
    library = pytest.importorskip("langchain_openai")
    model = library.ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="toy")
    assert len(model.batch(["a", "b"], max_tokens=5)) == 2


def test_clients_of_many_kinds_are_served_at_once(toy: Path) -> None:
    kinds: list[Callable[[Server], None]] = [
        chats,
        follows_a_schema,
        responds,
        asks_at_once,
        leaves,
        is_wrong,
        langchains,
    ]
    with serving(Engine.load(toy)) as server:
        langchains(server)  # imports take seconds of one thread
        with ThreadPoolExecutor(len(kinds)) as threads:
            list(threads.map(lambda kind: [kind(server) for _ in range(ROUNDS)], kinds))
        engine = server.engine
        wait_until(lambda: not engine.running and not engine.waiting)
        assert engine.failure is None
        assert server.get("/health").status_code == 200
        metrics = server.get("/metrics").text
    assert 'vllm:num_requests_running{engine="0",model_name="toy"} 0.0' in metrics
