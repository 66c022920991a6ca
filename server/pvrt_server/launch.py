"""`pvrt serve FOLDER`: check all that can be checked, then run vLLM or the embedded engine."""

import importlib.util
import json
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

import torch

from pvrt.checkpoint import read_config
from pvrt.errors import ServeError
from pvrt.packed import is_packed, is_quantised, open_checkpoint, parse_grid_config

EngineName = Literal["auto", "vllm", "local"]
_log = logging.getLogger("pvrt_server")
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_LOG_FORMAT = "%(levelname)s %(asctime)s %(name)s: %(message)s"
# What a running request gets to finish after SIGTERM; then its stream ends with an error event.
_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Plan:
    """A checked call of `serve`. `url` is where this machine reaches the server."""

    model: Path
    name: str
    host: str
    port: int
    dtype: str
    max_model_len: int | None
    api_key: str | None = field(repr=False)
    log_level: str

    @property
    def url(self) -> str:
        """http://host:port"""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def serve(
    model: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    engine: EngineName = "auto",
    dtype: str = "auto",
    max_model_len: int | None = None,
    served_model_name: str | None = None,
    api_key: str | None = None,
    log_level: str = "info",
    extra: list[str] | None = None,
) -> int:
    """Serve a checkpoint folder until SIGINT or SIGTERM; returns the exit code.

    engine auto is vLLM where it is installed. extra are flags for vLLM itself and come last, so
    they override ours; the embedded engine has none. max_model_len counts tokens. port 0 takes any
    free one. The name defaults to the folder's. Raises CheckpointError for a folder that is not
    sound and ServeError for what cannot be served as asked, before anything is loaded.
    """
    if log_level not in _LOG_LEVELS:
        raise ServeError(f"log level {log_level!r} is not one of {', '.join(_LOG_LEVELS)}")
    logging.basicConfig(level=log_level.upper(), format=_LOG_FORMAT)
    model = model.resolve()
    _check_folder(model)
    chosen = _choose(engine, model)
    if chosen == "local" and extra:
        raise ServeError(
            f"the embedded engine has no option {extra[0]}; flags after -- are vLLM's, "
            "which --engine vllm takes"
        )
    if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
        _log.warning("%s can be reached by others and there is no --api-key", host)
    with closing(_bind(host, port)) as listener:
        port = listener.getsockname()[1]
        name = served_model_name or model.name
        plan = Plan(model, name, host, port, dtype, max_model_len, api_key, log_level)
        if chosen == "local":
            return _serve_local(plan, listener)
    return _serve_vllm(plan, extra or [])


def _check_folder(model: Path) -> None:
    if is_quantised(read_config(model)):
        open_checkpoint(model)
    templates = ("chat_template.jinja", "chat_template.json")
    tokenizer = model / "tokenizer_config.json"
    text = tokenizer.read_text(encoding="utf-8") if tokenizer.is_file() else "{}"
    if not any((model / name).is_file() for name in templates):
        with suppress(ValueError):
            if json.loads(text).get("chat_template"):
                return
        _log.warning(
            "%s has no chat template: /v1/completions works, /v1/chat/completions will not until "
            "the original model's chat_template.jinja is copied into the folder",
            model,
        )


def _choose(engine: EngineName, model: Path) -> Literal["vllm", "local"]:
    installed = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not installed:
        raise ServeError("vLLM is not installed: pip install 'pvrt[vllm]', or use --engine local")
    if engine == "local" or not installed:
        return "local"
    problem = _grid_problem(model)
    if engine == "vllm" and problem:
        raise ServeError(f"{problem}; use --engine local")
    if problem:
        _log.info("%s: serving with the embedded engine", problem)
    return "local" if problem else "vllm"


def _grid_problem(model: Path) -> str | None:
    """Why vLLM cannot run a folder of scalar grids on this machine, or None.

    vLLM 0.32 has one product with grids on CPUs: 4 bits, in its build for AVX-512. On GPUs it
    chooses among many and says itself what it lacks.
    """
    config = read_config(model)
    if not is_packed(config) or torch.cuda.is_available():
        return None
    bits = parse_grid_config(config["quantization_config"], str(model)).bits
    if bits != 4:
        return f"vLLM runs grids of 4 bits on a CPU, and {model.name} has {bits}"
    if platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_supported():
        return "vLLM runs grids on CPUs with AVX-512, which this one has not"
    return None


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket, not yet listening, so that nobody else takes the port while we load."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ServeError(f"{host} is no address of this machine; try --host 127.0.0.1") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ServeError(
            f"cannot listen on {host} port {port} ({error.strerror}); stop what is using it or "
            f"try --port {port + 1 if port < 65535 else 8000}"
        ) from error
    return listener


def _announce(plan: Plan) -> None:
    """Print where the server is and two calls to paste."""
    url = plan.url
    key = "YOUR_KEY" if plan.api_key else "none"
    header = f' -H "Authorization: Bearer {key}"' if plan.api_key else ""
    body = json.dumps({"model": plan.name, "messages": [{"role": "user", "content": "Hello"}]})
    print(
        f"""
{plan.name} is served at {url}/v1

curl {url}/v1/chat/completions -H "Content-Type: application/json"{header} \\
  -d '{body}'

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="{key}")
answer = client.chat.completions.create(
    model="{plan.name}", messages=[{{"role": "user", "content": "Hello"}}]
)
print(answer.choices[0].message.content)
""",
        flush=True,
    )


def _serve_local(plan: Plan, listener: socket.socket) -> int:
    import uvicorn

    from pvrt_server.app import create_app
    from pvrt_server.engine import Engine
    from pvrt_server.loading import EngineOptions

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                _announce(plan)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            engine.stop(_GRACE_SECONDS)
            super().handle_exit(sig, frame)

    engine = Engine.load(plan.model, EngineOptions(plan.dtype, plan.max_model_len))
    with engine:
        config = uvicorn.Config(
            create_app(engine, plan.name, plan.api_key),
            log_level=plan.log_level,
            timeout_graceful_shutdown=int(_GRACE_SECONDS) + 5,
        )
        # uvicorn raises a signal again once it has shut down, for whoever handled it before.
        handlers = {s: signal.signal(s, _ignore) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            server = Server(config)
            server.run(sockets=[listener])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0 if server.started else 1


def _ignore(number: int, frame: FrameType | None) -> None:
    """A signal that has done its work."""


def _serve_vllm(plan: Plan, extra: list[str]) -> int:
    child = subprocess.Popen(
        vllm_command(plan, extra), env=vllm_environment(plan, os.environ), start_new_session=True
    )
    watcher = threading.Thread(target=_announce_when_ready, args=(plan, child), daemon=True)
    watcher.start()
    return _follow(child)


def vllm_command(plan: Plan, extra: list[str]) -> list[str]:
    """The command line of vLLM's own server with our defaults.

    As a module, because the `vllm` script of the CPU package does not start.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(plan.model), "--served-model-name", plan.name, str(plan.model)]
    command += ["--host", plan.host, "--port", str(plan.port), "--dtype", plan.dtype]
    command += ["--uvicorn-log-level", plan.log_level]
    if _vllm_has("entrypoints/serve/utils/sse_keep_alive.py"):
        command += ["--sse-keep-alive-interval", "15"]
    if plan.max_model_len is not None:
        command += ["--max-model-len", str(plan.max_model_len)]
    return command + extra


def _vllm_has(file: str) -> bool:
    """Whether the installed vLLM has a file; importing it to ask would take seconds."""
    spec = importlib.util.find_spec("vllm")
    return (
        spec is not None and spec.origin is not None and (Path(spec.origin).parent / file).is_file()
    )


def vllm_environment(plan: Plan, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for vLLM's server, made from ours."""
    result = dict(environment)
    if plan.api_key is not None:
        result["VLLM_API_KEY"] = plan.api_key  # not a flag: anybody can read those
    plugins = result.get("VLLM_PLUGINS")
    if plugins is not None and "pvrt" not in plugins.split(","):
        # An allow-list without us would end in "unknown quantization method".
        result["VLLM_PLUGINS"] = ",".join(name for name in (plugins, "pvrt") if name)
    return result


def _announce_when_ready(plan: Plan, child: "subprocess.Popen[bytes]") -> None:
    while child.poll() is None:
        with suppress(OSError):
            with urllib.request.urlopen(f"{plan.url}/health", timeout=5):
                _announce(plan)
            return
        time.sleep(0.5)


def _follow(child: "subprocess.Popen[bytes]") -> int:
    """Wait for a child, pass signals on, return its exit code (128 + signal if killed)."""

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers: dict[int, Callable[[int, FrameType | None], object] | int | None] = {
        number: signal.signal(number, forward) for number in signals
    }
    try:
        code = child.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
