"""`--check` passes on a good server and fails, by name, on a bad one."""

from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from pvrt_server.api.app import create_app
from pvrt_server.engine.engine import Engine
from pvrt_server.options import ServeOptions
from pvrt_server.self_test import Target, report, run_checks
from tests.fixtures.command_line import run
from tests.server import running
from tests.server.running import Server


def test_the_embedded_engine_passes_every_check_on_the_command_line(toy: Path) -> None:
    done = run("serve", str(toy), "--engine", "local", "--port", "0", "--api-key", "k", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    assert "nothing else without the key" in done.stdout
    assert "KV cache" in done.stdout  # what fits is said first


@pytest.fixture(scope="module")
def failures(toy: Path) -> dict[str, str]:
    """What the checks find wrong with a server that breaks several promises."""

    def sloppy(engine: Engine, options: ServeOptions) -> Any:
        app = create_app(engine, options)

        async def broken(scope: Scope, receive: Receive, send: Send) -> None:
            async def spoil(message: Any) -> None:
                if message["type"] == "http.response.body":
                    body = message["body"].replace(b"data: [DONE]\n\n", b"")
                    message = {**message, "body": body.replace(b'"error"', b'"detail"')}
                elif message["type"] == "http.response.start":
                    kept = [h for h in message["headers"] if h[0] != b"content-length"]
                    message = {**message, "headers": kept}
                await send(message)

            await app(scope, receive, spoil)

        return broken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "create_app", sloppy)
        with running.serving(Engine.load(toy)) as server:
            results = list(run_checks(Target(server.url, "toy", None, True)))
    return {result.name: result.problem for result in results if result.problem is not None}


def test_a_stream_without_end_and_errors_without_envelope_are_found(
    failures: dict[str, str],
) -> None:
    assert set(failures) == {
        "stream: same text, usage chunk, [DONE]",
        "chat: stream, usage chunk, [DONE]",
        "error: unknown model is 404",
        "error: bad value is 400, in the envelope",
        "error: context overflow is 400",
        "error: no JSON is 400",
    }
    assert "[DONE]" in failures["stream: same text, usage chunk, [DONE]"]


def test_the_report_counts_and_names_what_failed(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    passed = report(run_checks(Target(server.url, "another-name", None, False)))
    said = capsys.readouterr().out
    assert not passed
    assert "FAIL  models: name and context" in said
    assert "ok    health, without a key" in said
