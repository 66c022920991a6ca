"""A server as a process of its own, from its start to its end; the standard library alone."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

SECONDS = 600  # vLLM compiles for minutes on a CPU
ENVIRONMENT = {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Server:
    """Where it answers, and its process."""

    url: str
    pid: int


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running(
    command: Sequence[str], port: int, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start a server, yield it once /health answers, end it with all that it started.

    Its output goes to stderr. Ends the script with a sentence where it does not come up.
    """
    print(f"\n$ {' '.join(command)}", file=sys.stderr, flush=True)
    process = subprocess.Popen(
        command,
        env={**os.environ, **ENVIRONMENT, **(environment or {})},
        stdout=sys.stderr,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + SECONDS
        while not _healthy(url):
            if process.poll() is not None:
                sys.exit(f"the server ended with {process.returncode}: {' '.join(command)}")
            if time.monotonic() > end:
                sys.exit(f"the server was not ready in {SECONDS} s: {' '.join(command)}")
            time.sleep(0.2)
        yield Server(url, process.pid)
    finally:
        for sent, patience in ((signal.SIGTERM, 60), (signal.SIGKILL, 10)):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sent)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)


def pvrt(folder: object, port: int, engine: str, *flags: str) -> list[str]:
    """The command of `pvrt serve`."""
    place = ["--engine", engine, "--port", str(port)]
    return [sys.executable, "-m", "pvrt", "serve", str(folder), *place, *flags]


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:  # nobody listens yet, or the answer is an error (urllib's is an OSError)
        return False
