"""vLLM's own server as a child process: its command line, its environment, its life and its end."""

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

from pvrt.checkpoint import read_config
from pvrt.errors import ServeError
from pvrt_server.fits import Fit
from pvrt_server.frontend import FOLDER_VARIABLE, KEY_VARIABLE
from pvrt_server.options import GRACE_SECONDS, KEEP_ALIVE_SECONDS, Plan
from pvrt_server.startup_failures import TAIL_CHARACTERS, explain
from pvrt_server.templates import chat_template
from pvrt_server.tool_parsers import tool_parser

_SSE_SECONDS = 15
# Flags that pvrt has itself, and answers for: the address that it prints, the key that it guards.
_OURS = ("--model", "--host", "--port", "--api-key", "--served-model-name", "--uds")
# vLLM reserves this share of a GPU; more leaves too little for graphs.
_MOST_OF_A_GPU = 0.92
# Sequences of full length that the cache on a CPU has room for, memory allowing.
_CPU_SEQUENCES = 4


def installed() -> Path | None:
    """The folder of the installed vLLM. Importing it to ask would take seconds."""
    spec = importlib.util.find_spec("vllm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def check_flags(extra: list[str]) -> None:
    """Raise ServeError for flags of vLLM that stand for pvrt's own."""
    for flag in extra:
        name = flag.partition("=")[0].replace("_", "-")
        if name in _OURS:
            raise ServeError(f"{name} is pvrt's own: give it before the --")


def serve_vllm(plan: Plan, fit: Fit, extra: list[str], on_ready: Callable[[], bool]) -> int:
    """Run vLLM's server until it ends or a signal comes; returns its exit code.

    on_ready is called once, in a thread, when the server answers; True ends it. Raises ServeError
    where vLLM ends for a known reason before it was ready.
    """
    child = subprocess.Popen(
        vllm_command(plan, fit, extra),
        env=vllm_environment(plan, fit, extra, os.environ),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output = _Tee(child)
    ready = threading.Event()
    watcher = threading.Thread(target=_watch, args=(plan, child, ready, on_ready), daemon=True)
    watcher.start()
    code, told = _follow(child)
    # Not joined for ever: a worker that outlives its server would hold the pipe open.
    output.thread.join(5)
    watcher.join(5)
    if code and not told:
        reason = explain(output.tail(), shlex.quote(str(plan.model)), child.returncode)
        if reason is not None:
            raise ServeError(f"vLLM {'stopped' if ready.is_set() else 'did not start'}: {reason}")
    return code


def vllm_command(plan: Plan, fit: Fit, extra: list[str]) -> list[str]:
    """The command line of vLLM's own server: our defaults, then the user's flags, which win.

    As a module, because the `vllm` script of the CPU package does not start. All flags that are
    given unasked are known to vLLM 0.30 to 0.33.
    """
    folder = installed() or Path()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(plan.model), "--served-model-name", plan.name, str(plan.model)]
    command += ["--host", plan.host, "--port", str(plan.port), "--dtype", plan.dtype]
    command += ["--uvicorn-log-level", plan.log_level]
    if plan.access_log:
        command += ["--disable-access-log-for-endpoints", "/health,/metrics,/pvrt/status"]
    else:
        command += ["--disable-uvicorn-access-log"]
    command += ["--middleware", "pvrt_server.frontend.Frontend"]
    if plan.max_model_len is not None or fit.max_model_len < fit.wanted_len:
        command += ["--max-model-len", str(fit.max_model_len)]
    for flag, value in (
        ("--max-num-seqs", plan.max_num_seqs),
        ("--max-num-queued-reqs", plan.max_num_queued_reqs),
    ):
        command += [] if value is None else [flag, str(value)]
    command += ["--sse-keep-alive-interval", str(_SSE_SECONDS)]
    command += ["--shutdown-timeout", str(int(GRACE_SECONDS))]
    config = read_config(plan.model) if plan.model.is_dir() else {}
    parser = tool_parser(chat_template(plan.model), str(config.get("model_type")), folder)
    if parser is not None and not _given(extra, "--tool-call-parser"):
        command += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    if fit.device.kind == "cuda" and not _given(
        extra, "--gpu-memory-utilization", "--kv-cache-memory-bytes"
    ):
        # vLLM wants a share of all memory to be free; a desktop uses some of it.
        share = min(_MOST_OF_A_GPU, 0.98 * fit.device.free_bytes / fit.device.total_bytes)
        command += ["--gpu-memory-utilization", f"{share:.2f}"]
    return command + extra


def vllm_environment(
    plan: Plan, fit: Fit, extra: list[str], environment: Mapping[str, str]
) -> dict[str, str]:
    """The environment for vLLM's server, made from ours; what the user set stays."""
    result = {
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_SECONDS),
        "VLLM_LOGGING_LEVEL": plan.log_level.upper(),
        "VLLM_NO_USAGE_STATS": "1",  # nothing leaves this machine unasked
        **environment,
        FOLDER_VARIABLE: str(plan.model),
    }
    if plan.api_key is not None:
        result[KEY_VARIABLE] = plan.api_key  # not a flag: anybody can read those
    if fit.device.kind == "cpu" and not _given(
        extra, "--kv-cache-memory-bytes", "--gpu-memory-utilization"
    ):
        wanted = min(_CPU_SEQUENCES * fit.cache.bytes_for(fit.max_model_len), fit.cache_bytes)
        result.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(wanted / 2**30))))
    plugins = result.get("VLLM_PLUGINS")
    if plugins is not None and "pvrt" not in plugins.split(","):
        # An allow-list without us would end in "unknown quantization method".
        result["VLLM_PLUGINS"] = ",".join(name for name in (plugins, "pvrt") if name)
    return result


def gpu_count(extra: list[str]) -> int:
    """The number of GPUs that flags for vLLM ask for."""
    count = 1
    for names in (("--tensor-parallel-size", "-tp"), ("--pipeline-parallel-size", "-pp")):
        for place, flag in enumerate(extra):
            name, _, value = flag.partition("=")
            if name.replace("_", "-") in names:
                value = value or (extra[place + 1] if place + 1 < len(extra) else "")
                count *= int(value) if value.isdigit() else 1
    return count


def _given(extra: list[str], *names: str) -> bool:
    return any(flag.partition("=")[0].replace("_", "-") in names for flag in extra)


class _Tee:
    """Passes a child's output on as it comes, and keeps the end of it."""

    def __init__(self, child: "subprocess.Popen[bytes]") -> None:
        assert child.stdout is not None
        self._source = child.stdout
        self._kept = bytearray()
        self.thread = threading.Thread(target=self._copy, daemon=True)
        self.thread.start()

    def tail(self) -> str:
        """The end of the output so far."""
        return bytes(self._kept).decode("utf-8", "replace")

    def _copy(self) -> None:
        with self._source, suppress(OSError):
            while piece := os.read(self._source.fileno(), 1 << 16):
                sys.stderr.buffer.write(piece)
                sys.stderr.buffer.flush()
                self._kept += piece
                del self._kept[:-TAIL_CHARACTERS]


def _watch(
    plan: Plan,
    child: "subprocess.Popen[bytes]",
    ready: threading.Event,
    on_ready: Callable[[], bool],
) -> None:
    while child.poll() is None:
        with suppress(OSError):
            with urllib.request.urlopen(f"{plan.url}/health", timeout=5):
                ready.set()
            if on_ready():
                child.send_signal(signal.SIGTERM)
            return
        time.sleep(0.5)


def _follow(child: "subprocess.Popen[bytes]") -> tuple[int, bool]:
    """Wait for a child and pass signals on.

    Returns its exit code (128 + signal if killed) and whether a signal was passed on.
    """
    told = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
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
    return (code if code >= 0 else 128 - code), told
