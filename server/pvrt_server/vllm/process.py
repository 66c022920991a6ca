"""vLLM's own server as a child process: its command line, its environment, its life and its end."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from pvrt.errors import ServeError
from pvrt.vllm_plugin.parent import SERVER_VARIABLE
from pvrt_server.backend import Decision
from pvrt_server.opened import OpenedModel
from pvrt_server.options import GRACE_SECONDS, KEEP_ALIVE_SECONDS, ServeOptions
from pvrt_server.vllm.chat_flags import chat_flags
from pvrt_server.vllm.middleware import frontend_environment
from pvrt_server.vllm.response_stores import STORE_VARIABLE
from pvrt_server.vllm.startup_errors import TAIL_CHARACTERS, explain

# vLLM reserves this share of a GPU; more leaves too little for graphs.
_MOST_OF_A_GPU = 0.92
# Sequences of full length that the cache on a CPU has room for, memory allowing.
_CPU_SEQUENCES = 4
_GRAMMARS = "--structured-outputs-config"
# Where the user says how much memory the cache gets, we do not.
_MEMORY_FLAGS = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")


def serve_vllm(
    opened: OpenedModel, options: ServeOptions, decision: Decision, on_ready: Callable[[], bool]
) -> int:
    """Run vLLM's server until it ends or a signal comes; returns its exit code.

    on_ready is called once, in a thread, when the server answers; True ends it. Raises ServeError
    where vLLM ends for a known reason before it was ready.
    """
    # Kept to the end: a worker that vLLM starts again reads it again.
    with TemporaryDirectory(prefix="pvrt-") as folder:
        vllm = decision.machine.vllm or Path()
        chat = chat_flags(opened, options, vllm, Path(folder))
        return _serve(opened, options, decision, chat, on_ready)


def _serve(
    opened: OpenedModel,
    options: ServeOptions,
    decision: Decision,
    chat: Sequence[str],
    on_ready: Callable[[], bool],
) -> int:
    child = subprocess.Popen(
        vllm_command(opened, options, decision, chat),
        env=vllm_environment(opened, options, decision, os.environ),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output = _Tee(child)
    ready = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(options.url, child, ready, on_ready), daemon=True
    )
    watcher.start()
    code, told = _follow(child)
    # Not joined for ever: a worker that outlives its server would hold the pipe open.
    output.thread.join(5)
    watcher.join(5)
    if code and not told:
        reason = explain(output.tail(), shlex.quote(str(opened.path)), child.returncode)
        if reason is not None:
            raise ServeError(f"vLLM {'stopped' if ready.is_set() else 'did not start'}: {reason}")
    return code


def vllm_command(
    opened: OpenedModel, options: ServeOptions, decision: Decision, chat: Sequence[str] = ()
) -> list[str]:
    """The command line of vLLM's own server: our defaults, then the user's flags, which win.
    chat: see `chat_flags`.

    All flags that are given unasked are known to vLLM 0.30 to 0.33.
    """
    folder, capacity = str(opened.path), decision.capacity
    command = [sys.executable, "-m", "pvrt_server.vllm.server"]
    command += ["--model", folder, "--served-model-name", options.name(opened.path), folder]
    command += ["--host", options.host, "--port", str(options.port), "--dtype", decision.dtype]
    command += ["--uvicorn-log-level", options.log_level]
    if options.check:
        command += ["--disable-uvicorn-access-log"]
    else:
        command += ["--disable-access-log-for-endpoints", "/health,/metrics,/pvrt/status"]
    command += ["--enable-tokenizer-info-endpoint"]
    command += ["--middleware", "pvrt_server.vllm.middleware.Frontend"]
    if (
        options.max_model_len is not None
        or capacity.max_model_len < capacity.wanted_len
        or _is_stretched(opened, decision)
    ):
        command += ["--max-model-len", str(capacity.max_model_len)]
    for flag, value in (
        ("--max-num-seqs", options.max_num_seqs),
        ("--max-num-queued-reqs", options.max_num_queued_reqs),
    ):
        command += [] if value is None else [flag, str(value)]
    command += ["--sse-keep-alive-interval", f"{options.sse_keep_alive_seconds:g}"]
    command += ["--shutdown-timeout", str(int(GRACE_SECONDS))]
    command += chat
    command += _grammar_flags(opened, options)
    command += _memory_flags(options, decision)
    return [*command, *options.extra]


def _is_stretched(opened: OpenedModel, decision: Decision) -> bool:
    """Whether the context is longer than the config states, because its rotations were scaled for
    it. vLLM counts YaRN as stated already, and asks for consent to go beyond."""
    stated = getattr(opened.config.get_text_config(), "max_position_embeddings", None)
    return stated is not None and decision.capacity.max_model_len > stated


def _grammar_flags(opened: OpenedModel, options: ServeOptions) -> list[str]:
    """One library for all grammars, see habits.py, and JSON on one line: small models write blanks
    to the end wherever they may. Mistral's own tokenizer needs another library for its tools."""
    if options.gives(_GRAMMARS) or (opened.path / "tekken.json").is_file():
        return []
    return [_GRAMMARS, '{"backend": "xgrammar", "disable_any_whitespace": true}']


def _memory_flags(options: ServeOptions, decision: Decision) -> list[str]:
    machine = decision.machine
    if machine.device == "cpu" or options.gives(*_MEMORY_FLAGS):
        return []
    # vLLM wants a share of all memory to be free; a desktop uses some of it.
    share = min(_MOST_OF_A_GPU, 0.98 * machine.free_bytes / machine.total_bytes)
    return ["--gpu-memory-utilization", f"{share:.2f}"]


def vllm_environment(
    opened: OpenedModel, options: ServeOptions, decision: Decision, environment: Mapping[str, str]
) -> dict[str, str]:
    """The environment for vLLM's server, made from ours; what the user set stays."""
    result = {
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_SECONDS),
        "VLLM_LOGGING_LEVEL": options.log_level.upper(),
        STORE_VARIABLE: "1",  # previous_response_id
        "VLLM_NO_USAGE_STATS": "1",  # nothing leaves this machine unasked
        **environment,
        SERVER_VARIABLE: str(os.getpid()),
        **frontend_environment(opened, options),
    }
    if decision.machine.device == "cpu" and not options.gives(*_MEMORY_FLAGS):
        capacity = decision.capacity
        full = _CPU_SEQUENCES * capacity.cache.bytes_for(capacity.max_model_len)
        wanted = min(full, capacity.cache_bytes)
        result.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(wanted / 2**30))))
    if _is_stretched(opened, decision) and not options.gives("--max-model-len"):
        result.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    plugins = result.get("VLLM_PLUGINS")
    if plugins is not None and "pvrt" not in plugins.split(","):
        # An allow-list without us would end in "unknown quantization method".
        result["VLLM_PLUGINS"] = ",".join(name for name in (plugins, "pvrt") if name)
    return result


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
            while read := os.read(self._source.fileno(), 1 << 16):
                sys.stderr.buffer.write(read)
                sys.stderr.buffer.flush()
                self._kept += read
                del self._kept[:-TAIL_CHARACTERS]


def _watch(
    url: str,
    child: "subprocess.Popen[bytes]",
    ready: threading.Event,
    on_ready: Callable[[], bool],
) -> None:
    while child.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except OSError:
            time.sleep(0.5)
            continue
        ready.set()
        if on_ready():
            child.send_signal(signal.SIGTERM)
        return


def _follow(child: "subprocess.Popen[bytes]") -> tuple[int, bool]:
    """Wait for a child and pass signals on.

    Returns its exit code (128 + signal if killed) and whether a signal was passed on.
    """
    told = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        child.send_signal(number)

    # Windows has no terminal that hangs up.
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handlers: dict[int, Callable[[int, FrameType | None], object] | int | None] = {
        number: signal.signal(number, forward) for number in signals
    }
    try:
        code = child.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return (code if code >= 0 else 128 - code), told
