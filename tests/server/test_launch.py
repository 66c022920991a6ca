import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from pvrt.errors import CheckpointError, ServeError
from pvrt.kv_cache import CacheShape
from pvrt_server.backend import Decision
from pvrt_server.capacity import Capacity, Machine
from pvrt_server.launch import serve
from pvrt_server.opened import OpenedModel, open_model
from pvrt_server.options import ServeOptions
from pvrt_server.vllm.process import vllm_command, vllm_environment
from tests.fixtures.toy import write_toy
from tests.server.running import PATIENCE, wait_until

# Serves; before a sequence of 30 tokens gets the next one, a statement runs.
RUN_WITH = """
import sys
from pathlib import Path
from pvrt_server.engine import cpu_model, models
from pvrt_server.api import local_server
from pvrt_server.launch import serve
from pvrt_server.options import ServeOptions
for kind in (cpu_model.CpuModel, models.TransformersModel):
    def step(self, states, tokens, argmax_only=False, step=kind.step):
        if states[0].length == 30:
            {statement}
        return step(self, states, tokens, argmax_only)
    kind.step = step
local_server.GRACE_SECONDS = 600
sys.exit(serve(Path(sys.argv[1]), ServeOptions(engine="local", port=0, api_key="k")))
"""

FAKE_VLLM = """
import http.server, json, pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
flags = sys.argv[1:]
pathlib.Path(FLAGS_FILE).write_text(json.dumps(flags))
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
port = int(flags[flags.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def decision(device: Any = "cpu", free: int = 10**10, wanted: int = 512) -> Decision:
    """A model of 1 GB that has 1 MB of cache per token and was made for 4096 tokens, on vLLM."""
    machine = Machine(device, free, 2 * 10**10)
    capacity = Capacity(10**9, CacheShape(((10**6, None),), 4096), free - 10**9, wanted)
    return Decision("vllm", "it is installed", machine, "auto", "packed", [], False, capacity, 0)


def command(toy: Path, decided: Decision | None = None, **options: Any) -> list[str]:
    """vLLM's command line for options."""
    return vllm_command(open_model(toy), ServeOptions(**options), decided or decision())


def environment(
    toy: Path, given: dict[str, str] | None = None, decided: Decision | None = None, **options: Any
) -> dict[str, str]:
    """What vLLM's process is given beside what the user set."""
    chosen = ServeOptions(**options)
    return vllm_environment(open_model(toy), chosen, decided or decision(), given or {})


def test_vllm_has_one_library_for_grammars_and_json_on_one_line(toy: Path, tmp_path: Path) -> None:
    flag = "--structured-outputs-config"
    given = command(toy)
    form = json.loads(given[given.index(flag) + 1])
    assert form == {"backend": "xgrammar", "disable_any_whitespace": True}
    for own in ((flag, "{}"), (f"{flag}.backend=outlines",)):
        assert flag not in command(toy, extra=own)[: -len(own)]
    shutil.copytree(toy, tmp_path / "mistral")
    (tmp_path / "mistral" / "tekken.json").write_text("{}")
    assert flag not in command(tmp_path / "mistral")


def test_a_port_in_use_is_one_sentence_before_anything_is_loaded(toy: Path) -> None:
    with taken_port() as port, pytest.raises(ServeError) as caught:
        serve(toy, ServeOptions(port=port, engine="local"))
    assert f"port {port} (Address already in use)" in str(caught.value)
    assert f"--port {port + 1}" in str(caught.value)


def test_a_folder_that_is_not_sound_is_refused_first(tmp_path: Path) -> None:
    with taken_port() as port:
        with pytest.raises(CheckpointError, match=r"config\.json is missing"):
            serve(tmp_path, ServeOptions(port=port))
        write_toy(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
        with pytest.raises(CheckpointError, match="damaged or cut short"):
            serve(tmp_path, ServeOptions(port=port))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "local", "extra": ("--enforce-eager",)}, "no option --enforce-eager"),
        ({"engine": "local", "host": "no.such.host.invalid"}, "no address of this machine"),
        ({"engine": "local", "host": "192.0.2.1"}, "cannot listen on 192.0.2.1"),
        ({"engine": "local", "dtype": "int4", "port": 0}, "dtype is 'int4'"),
        ({"engine": "local", "max_model_len": 4096, "port": 0}, "made for 512 tokens"),
        ({"engine": "local", "log_level": "loud"}, "--log-level is 'loud'; choose debug, info"),
        ({"engine": "local", "api_key": ""}, "the API key must be"),
    ],
)
def test_options_that_cannot_be_met_are_one_sentence(
    toy: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ServeError, match=message):
        serve(toy, ServeOptions(**options))


def test_vllm_is_asked_for_by_name_only_where_it_is_installed(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServeError, match=r"pip install 'vllm.*', or use --engine local"):
        serve(toy, ServeOptions(engine="vllm"))
    with pytest.raises(ServeError, match="no option --x"):  # auto is the embedded engine then
        serve(toy, ServeOptions(extra=("--x",)))


def test_a_missing_chat_template_and_an_open_door_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_toy(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ServeError):
        serve(tmp_path, ServeOptions(engine="local", host="0.0.0.0", max_model_len=4096))
    said = [record.message for record in caplog.records]
    assert any("no chat template" in line and "chat_template.jinja" in line for line in said)
    assert any("there is no --api-key" in line for line in said)


def test_vllm_gets_our_defaults_and_the_users_flags_last(toy: Path) -> None:
    extra = ("--dtype", "float16")
    found = command(toy, port=8123, served_model_name="m", max_model_len=512, extra=extra)
    assert found[:3] == [sys.executable, "-m", "pvrt_server.vllm.server"]
    joined = " ".join(found)
    assert f"--model {toy} --served-model-name m {toy}" in joined
    assert "--host 127.0.0.1 --port 8123" in joined
    assert "--max-model-len 512" in joined
    assert "--middleware pvrt_server.vllm.middleware.Frontend" in joined
    assert found[-2:] == ["--dtype", "float16"]


def test_bounds_go_to_either_engine_by_one_name(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = " ".join(command(toy, max_num_seqs=3, max_num_queued_reqs=7))
    assert "--max-num-seqs 3 --max-num-queued-reqs 7" in joined
    assert "--max-num" not in " ".join(command(toy))

    def start(opened: OpenedModel, options: ServeOptions, decided: Decision) -> None:
        raise ServeError(f"{options.sequences} at once of {options.requests}")

    monkeypatch.setattr("pvrt_server.engine.engine.Engine.start", start)
    with pytest.raises(ServeError, match="3 at once of 7"):
        serve(toy, ServeOptions(engine="local", port=0, max_num_seqs=3, max_num_queued_reqs=7))
    with pytest.raises(ServeError, match="16 at once of 256"):
        serve(toy, ServeOptions(engine="local", port=0))


def test_vllm_finds_its_own_context_unless_one_is_asked_for_or_less_fits(toy: Path) -> None:
    assert "--max-model-len" not in command(toy)
    found = command(toy, decision(free=2 * 10**9, wanted=4096))
    assert found[found.index("--max-model-len") + 1] == "1000"


def test_vllm_reserves_what_is_free_and_not_more(toy: Path) -> None:
    gpu = decision("cuda")
    found = command(toy, gpu)
    assert found[found.index("--gpu-memory-utilization") + 1] == "0.49"
    assert "0.49" not in command(toy, gpu, extra=("--gpu-memory-utilization=0.7",))
    # On a CPU: four sequences of 512 MB, in GiB; what the user says stays.
    assert environment(toy)["VLLM_CPU_KVCACHE_SPACE"] == "2"
    given = {"VLLM_CPU_KVCACHE_SPACE": "7"}
    assert environment(toy, given)["VLLM_CPU_KVCACHE_SPACE"] == "7"
    flags = ("--kv-cache-memory-bytes", "9")
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment(toy, extra=flags)


def test_the_number_of_gpus_is_read_from_the_flags_for_vllm() -> None:
    assert ServeOptions().gpus == 1
    assert ServeOptions(extra=("--tensor-parallel-size", "2", "-pp=3")).gpus == 6
    assert ServeOptions(extra=("--tensor_parallel_size=4",)).gpus == 4
    assert ServeOptions(extra=("--tensor-parallel-size",)).gpus == 1


@pytest.mark.parametrize("flag", ["--port", "--api-key=x", "--served_model_name"])
def test_flags_of_our_own_are_refused_behind_the_dashes(flag: str) -> None:
    with pytest.raises(ServeError, match="give it before the --"):
        ServeOptions(extra=(flag,))


def test_vllm_gets_the_key_unseen_and_our_plugin_always(toy: Path) -> None:
    assert "secret" not in " ".join(command(toy, api_key="secret"))
    assert "secret" not in repr(ServeOptions(api_key="secret"))
    assert environment(toy, api_key="secret")["VLLM_API_KEY"] == "secret"
    for given, expected in {"": "pvrt", "other": "other,pvrt", "a,pvrt": "a,pvrt"}.items():
        assert environment(toy, {"VLLM_PLUGINS": given})["VLLM_PLUGINS"] == expected
    assert "VLLM_PLUGINS" not in environment(toy)


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in vLLM's place that answers /health and nothing else; the file of its flags."""
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    flags = tmp_path / "flags.json"
    (package / "api_server.py").write_text(f"FLAGS_FILE = {str(flags)!r}\n{FAKE_VLLM}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("pvrt_server.capacity.installed_vllm", lambda: tmp_path / "vllm")
    return flags


def test_a_check_that_fails_ends_the_server_and_says_so_by_its_exit_code(
    toy: Path, fake_vllm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(toy, ServeOptions(engine="vllm", port=0, check=True)) == 1
    said = capsys.readouterr().out
    assert "ok    health, without a key" in said
    assert "FAIL  completion: text, usage, finish_reason" in said
    assert "--disable-uvicorn-access-log" in json.loads(fake_vllm.read_text())


def test_signals_reach_vllm_and_its_exit_code_comes_back(
    toy: Path, fake_vllm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    ended = threading.Event()

    def terminate_when_ready() -> None:
        while "is served at" not in "".join(said):
            said.append(capfd.readouterr().out)
            if ended.wait(0.05):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate_when_ready)
    thread.start()
    try:
        code = serve(
            toy,
            ServeOptions(
                engine="vllm", port=0, served_model_name="toy", extra=("--enforce-eager",)
            ),
        )
    finally:
        ended.set()
        thread.join()
    assert code == 7
    given = json.loads(fake_vllm.read_text())
    assert given[-1] == "--enforce-eager"
    port = given[given.index("--port") + 1]
    assert f"toy is served at http://127.0.0.1:{port}/v1" in "".join(said)


@pytest.mark.slow
def test_the_embedded_engine_serves_and_ends_cleanly_when_told_to(toy: Path) -> None:
    code = RUN_WITH.format(statement="sys.stdin.readline()  # until the test says so")
    command = [sys.executable, "-c", code, str(toy)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        url = announced_url(process)
        client = openai.OpenAI(base_url=url, api_key="k", max_retries=0, timeout=PATIENCE)
        stream = client.completions.create(
            model=toy.name,
            prompt="ab",
            stream=True,
            max_tokens=60,
            extra_body={"ignore_eos": True},
        )
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not listens(url))
        # What runs may finish.
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        chunks = [first, *stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        stream.close()
        client.close()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


def listens(url: str) -> bool:
    where = urlsplit(url)
    try:
        socket.create_connection((where.hostname, where.port or 0), timeout=PATIENCE).close()
    except ConnectionRefusedError:
        return False
    return True


def announced_url(process: "subprocess.Popen[str]") -> str:
    """The URL from the first snippet, which is printed when the server is ready."""
    assert process.stdout is not None
    for line in process.stdout:
        if "is served at" in line:
            return line.split()[-1]
    raise AssertionError("the server ended before it was ready")


@pytest.mark.vllm
def test_a_start_that_vllm_refuses_ends_in_one_sentence(toy: Path) -> None:
    with pytest.raises(ServeError, match=r"this vLLM has no tool-call parser nonsense\. Try"):
        serve(
            toy,
            ServeOptions(
                engine="vllm",
                port=0,
                extra=("--enable-auto-tool-choice", "--tool-call-parser", "nonsense"),
            ),
        )
