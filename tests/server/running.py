"""Servers for tests: on a free port, in a thread, over the toy model or over a script."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import torch
import uvicorn
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from pvrt_server.api.app import create_app
from pvrt_server.api.connection import protocol
from pvrt_server.engine.engine import Engine
from pvrt_server.engine.sampling import SamplingParams
from pvrt_server.engine.sequences import Runtime
from pvrt_server.engine.text import TextCodec
from pvrt_server.opened import open_model
from pvrt_server.options import ServeOptions
from pvrt_server.self_test import Target

#: Seconds that nothing takes, however slow or busy the machine is, unless it hangs.
PATIENCE = 120


def wait_until(condition: Callable[[], object]) -> None:
    """Return once something holds that will hold from then on, or until the test changes it."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class ScriptedModel:
    """Answers every prompt with the same tokens, then end-of-text.

    While `gate` is clear, the calls wait for it; it closes by itself after `hold_after` steps. A
    script that holds an exception raises it when its turn comes. `reads` and `steps` are the calls
    so far: tokens read, sequences in a step.
    """

    def __init__(self, folder: Path, script: Sequence[int | Exception]) -> None:
        self.config = AutoConfig.from_pretrained(folder)
        self.generation_config = SimpleNamespace(eos_token_id=self.config.eos_token_id)
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.weight_bytes = self.bytes_per_token = 0
        self.gate = threading.Event()
        self.gate.set()
        self.hold_after: int | None = None
        self.script = script
        self.reads: list[int] = []
        self.steps: list[int] = []

    def start(self) -> Any:
        return SimpleNamespace(at=0, length=0)

    def read(self, state: Any, tokens: Sequence[int], keep: int) -> Tensor:
        assert self.gate.wait(PATIENCE)
        self.reads.append(len(tokens))
        state.length += len(tokens)
        state.at = 0
        return self._logits(state).repeat(keep, 1)

    def step(
        self, states: Sequence[Any], tokens: Sequence[int], argmax_only: bool = False
    ) -> Tensor:
        assert self.gate.wait(PATIENCE)
        self.steps.append(len(tokens))
        for state in states:
            state.length += 1
            state.at += 1
        if len(self.steps) == self.hold_after:
            self.gate.clear()
        return torch.cat([self._logits(state) for state in states])

    def copy(self, state: Any, length: int) -> None:
        return None

    def _logits(self, state: Any) -> Tensor:
        token = self.config.eos_token_id
        if state.at < len(self.script):
            token = self.script[state.at]
        if isinstance(token, Exception):
            raise token
        logits = torch.zeros(1, self.config.vocab_size)
        logits[0, token] = 20.0
        return logits


def scripted_engine(
    folder: Path,
    script: str | Sequence[int | Exception],
    max_sequences: int = 8,
    max_requests: int = 64,
    prefill_chunk: int = 512,
) -> tuple[Engine, ScriptedModel]:
    """An engine that answers everything with a text or with tokens."""
    codec = TextCodec(AutoTokenizer.from_pretrained(folder))
    tokens = codec.encode(script) if isinstance(script, str) else script
    model = ScriptedModel(folder, tokens)
    runtime = Runtime(
        model=model,
        codec=codec,
        eos_ids=frozenset({model.config.eos_token_id}),
        vocabulary=model.config.vocab_size,
        max_model_len=model.config.max_position_embeddings,
        prefill_chunk=prefill_chunk,
        max_sequences=max_sequences,
        cache_tokens=1 << 20,
    )
    greedy = SamplingParams(temperature=0)
    options = ServeOptions(max_num_queued_reqs=max_requests)
    return Engine(runtime, open_model(folder), options, greedy), model


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    engine: Engine

    def client(self, **options: Any) -> openai.OpenAI:
        """The official client; it retries nothing, so that tests see the first answer."""
        options = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """GET a path."""
        return httpx.get(f"{self.url}{path}", timeout=PATIENCE, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """POST a JSON body as it is, or what the options say."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=PATIENCE, **options)

    def connect(self) -> socket.socket:
        """A connection without any client."""
        where = urlsplit(self.url)
        return socket.create_connection((where.hostname, where.port or 0), timeout=PATIENCE)


def post_bytes(path: str, body: bytes, *headers: bytes) -> bytes:
    """What a POST is on the wire; the server closes after its answer."""
    lines = [
        f"POST {path} HTTP/1.1".encode(),
        b"Host: localhost",
        b"Content-Type: application/json",
        f"Content-Length: {len(body)}".encode(),
        b"Connection: close",
        *headers,
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


@contextmanager
def serving(engine: Engine, **options: Any) -> Iterator[Server]:
    """Serve an engine as "toy" while the block runs."""
    chosen = ServeOptions(served_model_name="toy", **options)
    app, http = create_app(engine, chosen), protocol(chosen.request_seconds)
    config = uvicorn.Config(app, port=0, http=http, log_level="error", timeout_graceful_shutdown=30)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    assert server.started
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Server(f"http://127.0.0.1:{port}", engine)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


@contextmanager
def vllm_serving(folder: Path, log: Path, **options: Any) -> Iterator[Target]:
    """vLLM, started by `serve` on a folder in float32, while the block runs; its stderr
    goes to log."""
    given = {"engine": "vllm", "port": 0, "dtype": "float32", **options}
    extra = ("--enforce-eager", "--max-num-seqs", "4")
    code = (
        "import sys; from pathlib import Path; from pvrt_server.launch import serve; "
        "from pvrt_server.options import ServeOptions; "
        f"sys.exit(serve(Path({str(folder)!r}), ServeOptions(extra={extra!r}, **{given!r})))"
    )
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert process.stdout is not None
        try:
            line = next((line for line in process.stdout if "is served at" in line), None)
            if line is None:
                pytest.fail(log.read_text()[-3000:])
            name, key = options.get("served_model_name", folder.name), options.get("api_key")
            yield Target(line.split()[-1].removesuffix("/v1"), name, key, chat=True)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
