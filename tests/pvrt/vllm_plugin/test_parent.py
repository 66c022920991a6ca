"""A chain of processes as `pvrt serve`, vLLM's server and its workers are: the first is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from pvrt.vllm_plugin.parent import SERVER_VARIABLE
from tests.server.running import PATIENCE

# Each starts the next one, says who it is, and waits for what never comes.
CHAIN = """
import os, subprocess, sys
from pvrt.vllm_plugin.parent import SERVER_VARIABLE, end_with_parent
depth = int(sys.argv[1])
if depth == 0:
    os.environ[SERVER_VARIABLE] = str(os.getpid())
else:
    end_with_parent()
print(os.getpid(), flush=True)
if depth < 2:
    subprocess.Popen([sys.executable, __file__, str(depth + 1)])
sys.stdin.read()
"""


def test_all_end_with_the_first(tmp_path: Path) -> None:
    script = tmp_path / "chain.py"
    script.write_text(CHAIN)
    read, write = os.pipe()  # its other end stays open as long as one of them lives
    silence, held = os.pipe()
    first = subprocess.Popen(
        [sys.executable, str(script), "0"], stdin=silence, stdout=write, text=True
    )
    os.close(write)
    with os.fdopen(read) as output:
        seen = [int(output.readline()) for _ in range(3)]
        assert seen[0] == first.pid
        signal.alarm(PATIENCE)  # or an orphan would keep us here
        first.kill()
        assert output.read() == ""
        signal.alarm(0)
    first.wait(PATIENCE)
    os.close(silence)
    os.close(held)


def test_who_comes_too_late_ends_at_once() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(PATIENCE)
    code = "from pvrt.vllm_plugin.parent import end_with_parent; end_with_parent(); print('here')"
    environment = {**os.environ, SERVER_VARIABLE: str(gone.pid)}
    late = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, timeout=PATIENCE
    )
    assert (late.returncode, late.stdout) == (1, b"")
