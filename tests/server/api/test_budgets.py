"""Small requests that ask for much: answered or refused at once, and nobody else waits."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import abuse
from tests.server.running import Server, scripted_engine, serving, wait_until

#: CPU seconds of this process, client and server together. What was mended took minutes.
SECONDS = 2


@pytest.fixture(scope="module")
def target(toy: Path) -> Iterator[Server]:
    engine, _ = scripted_engine(toy, "one")
    engine.codec.bound(512)  # as engines that are loaded do
    with serving(engine) as running:
        yield running


def posted(target: Server, path: str, body: Any) -> tuple[httpx.Response, float]:
    """The answer, and CPU seconds of this process until it came."""
    content = json.dumps(body).encode()
    started = time.process_time()
    answer = target.post(path, content=content, headers={"Content-Type": "application/json"})
    return answer, time.process_time() - started


@pytest.mark.parametrize("name", abuse.REFUSED)
def test_a_refusal_costs_no_more_than_its_first_reason(target: Server, name: str) -> None:
    answer, seconds = posted(target, *abuse.REFUSED[name])
    assert answer.status_code in (400, 404), answer.text
    assert len(answer.content) < 3000
    assert seconds < SECONDS


@pytest.mark.parametrize("name", abuse.LARGE)
def test_what_is_large_and_sound_costs_little(target: Server, name: str) -> None:
    answer, seconds = posted(target, *abuse.LARGE[name])
    assert answer.status_code in (200, 400), answer.text
    assert seconds < abuse.CPU_SECONDS


@pytest.mark.usefixtures("short_check")
@pytest.mark.parametrize("name", abuse.SCHEMAS)
def test_a_schema_without_end_is_refused(target: Server, name: str) -> None:
    for place in ("format", "text", "tool"):
        path, body = abuse.GRAMMARS[f"{name}: {place}"]
        started = time.process_time()
        answer = target.post(path, body)
        assert answer.status_code == 400
        assert "cannot be enforced" in answer.text or place == "tool"  # which the toy has none of
        assert len(answer.content) < 3000
        assert time.process_time() - started < SECONDS


@pytest.mark.usefixtures("short_check")
@pytest.mark.parametrize("name", abuse.TRICKS)
def test_connections_that_ask_for_much_leave_nothing_behind(target: Server, name: str) -> None:
    trick, _ = abuse.TRICKS[name]
    started = time.process_time()
    trick(target.url)
    wait_until(lambda: target.engine.running == 0 and target.engine.waiting == 0)
    assert target.post(abuse.COMPLETIONS, {"prompt": "a"}).status_code == 200
    assert time.process_time() - started < abuse.CPU_SECONDS
