"""`pvrt serve FOLDER`: check all that can be checked, then run vLLM or the embedded engine."""

import importlib.util
import logging
import platform
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Literal

import torch

from pvrt.checkpoint import read_config
from pvrt.errors import ServeError
from pvrt.packed import is_packed, is_quantised, open_checkpoint, parse_grid_config
from pvrt_server.fits import Device, Fit, fit, gigabytes
from pvrt_server.options import GRACE_SECONDS, KEEP_ALIVE_SECONDS, Plan
from pvrt_server.smoke import Target, report, run_checks
from pvrt_server.snippets import snippets
from pvrt_server.templates import chat_template
from pvrt_server.vllm_process import check_flags, gpu_count, serve_vllm

EngineName = Literal["auto", "vllm", "local"]
_log = logging.getLogger("pvrt_server")
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_LOG_FORMAT = "%(levelname)s %(asctime)s %(name)s: %(message)s"


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
    max_num_seqs: int | None = None,
    max_num_queued_reqs: int | None = None,
    check: bool = False,
    extra: list[str] | None = None,
) -> int:
    """Serve a checkpoint folder until SIGINT or SIGTERM; returns the exit code.

    engine auto is vLLM where it is installed. extra are flags for vLLM itself and come last, so
    they override ours; the embedded engine has none. max_model_len counts tokens; None is as much
    of the model's own as fits. At most max_num_seqs sequences run at once, and requests are refused
    while max_num_queued_reqs run or wait; None is the engine's own bound. port 0 takes any free
    one. The name defaults to the folder's. With check the server is tested when it is ready, a
    table printed, and the server ended: the exit code is 0 if all passed. Raises CheckpointError
    for a folder that is not sound and ServeError for what cannot be served as asked, before
    anything is loaded.
    """
    if log_level not in _LOG_LEVELS:
        raise ServeError(f"log level {log_level!r} is not one of {', '.join(_LOG_LEVELS)}")
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
        raise ServeError("the API key must be one or more printable ASCII characters")
    logging.basicConfig(level=log_level.upper(), format=_LOG_FORMAT)
    model, extra = model.resolve(), extra or []
    _check_folder(model)
    chosen = _choose(engine, model)
    if chosen == "local" and extra:
        raise ServeError(
            f"the embedded engine has no option {extra[0]}; flags after -- are vLLM's, "
            "which --engine vllm takes"
        )
    check_flags(extra)
    if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
        _log.warning("%s can be reached by others and there is no --api-key", host)
    with closing(_bind(host, port)) as listener:
        port = listener.getsockname()[1]
        name = served_model_name or model.name
        plan = Plan(
            model,
            name,
            host,
            port,
            dtype,
            max_model_len,
            api_key,
            log_level,
            access_log=not check,
            max_num_seqs=max_num_seqs,
            max_num_queued_reqs=max_num_queued_reqs,
        )
        room = fit(model, chosen, Device.here(gpu_count(extra)), dtype, max_model_len)
        _say_what_fits(plan, room, chosen)
        ready: _Check | _Announcement = _Check(plan) if check else _Announcement(plan)
        if chosen == "local":
            return ready.exit_code(_serve_local(plan, room, listener, ready))
    return ready.exit_code(serve_vllm(plan, room, extra, ready))


class _Announcement:
    """Called when the server is ready: prints where it is and what to paste."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __call__(self) -> bool:
        plan = self._plan
        chat = chat_template(plan.model) is not None
        print(f"\n{plan.name} is served at {plan.url}/v1")
        print(f"chat with it in the browser: {plan.url}/")
        print(snippets(plan.url, plan.name, keyed=plan.api_key is not None, chat=chat), flush=True)
        return False

    def exit_code(self, server: int) -> int:
        """The server's own."""
        return server


class _Check:
    """Called when the server is ready: tests it, prints the table, and has it ended."""

    def __init__(self, plan: Plan) -> None:
        chat = chat_template(plan.model) is not None
        self._target = Target(plan.url, plan.name, plan.api_key, chat)
        self._passed: bool | None = None

    def __call__(self) -> bool:
        self._passed = report(run_checks(self._target))
        return True

    def exit_code(self, server: int) -> int:
        """0 if all passed, 1 if one failed, the server's where it never was ready."""
        if self._passed is None:
            return server or 1
        return 0 if self._passed else 1


def _say_what_fits(plan: Plan, room: Fit, engine: str) -> None:
    wanted, most = plan.max_model_len, room.cache.longest
    if wanted is not None and wanted > most:
        raise ServeError(
            f"--max-model-len is {wanted}, but the model was made for {most} tokens; give "
            f"--max-model-len {most} or less"
        )
    print(f"{plan.name} on {'vLLM' if engine == 'vllm' else 'the embedded engine'}")
    for line in room.lines():
        print(f"  {line}")
    print(flush=True)
    if wanted is not None and room.max_model_len < wanted:
        raise ServeError(
            f"--max-model-len {wanted} needs {gigabytes(room.cache.bytes_for(wanted))} of KV cache "
            f"and {gigabytes(room.cache_bytes)} are free. Try: --max-model-len {room.longest}"
        )


def _check_folder(model: Path) -> None:
    if is_quantised(read_config(model)):
        open_checkpoint(model)
    if chat_template(model) is None:
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


def _serve_local(
    plan: Plan, room: Fit, listener: socket.socket, on_ready: Callable[[], bool]
) -> int:
    import uvicorn

    from pvrt_server.app import create_app
    from pvrt_server.engine import Engine
    from pvrt_server.loading import EngineOptions

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                threading.Thread(target=self.tell, daemon=True).start()

        def tell(self) -> None:
            if on_ready():
                self.should_exit = True

        def give_up(self) -> None:
            self.should_exit = True

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            engine.stop(GRACE_SECONDS)
            super().handle_exit(sig, frame)

    options = EngineOptions(plan.dtype, room.max_model_len)
    if plan.max_num_seqs is not None:
        options = replace(options, max_sequences=plan.max_num_seqs)
    if plan.max_num_queued_reqs is not None:
        options = replace(options, max_requests=plan.max_num_queued_reqs)
    engine = Engine.load(plan.model, options)
    with engine:
        config = uvicorn.Config(
            create_app(engine, plan.name, plan.api_key),
            log_level=plan.log_level,
            access_log=plan.access_log,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(GRACE_SECONDS) + 5,
        )
        # uvicorn raises a signal again once it has shut down, for whoever handled it before.
        handlers = {s: signal.signal(s, _ignore) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            server = Server(config)
            engine.on_broken = server.give_up  # whoever started us may start us again
            server.run(sockets=[listener])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0 if server.started and engine.failure is None else 1


def _ignore(number: int, frame: FrameType | None) -> None:
    """A signal that has done its work."""
