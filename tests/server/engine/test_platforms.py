"""The engine where the system lacks what Linux has."""

import mmap
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pvrt_server.engine.engine import Engine
from pvrt_server.engine.sampling import SamplingParams
from pvrt_server.engine.sequences import TokenEvent
from pvrt_server.options import ServeOptions
from pvrt_server.vllm import process
from tests.fixtures.toy import write_toy


def test_the_names_that_windows_lacks_are_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_toy(tmp_path)
    for name in ("MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_ANON", "MAP_SHARED"):
        monkeypatch.delattr(mmap, name)
    monkeypatch.delattr(signal, "SIGHUP")
    options = ServeOptions.model_validate({"dtype": "float32"})
    with Engine.load(tmp_path, options) as engine:
        events = engine.generate([256, 1, 2], SamplingParams(max_tokens=4, ignore_eos=True))
        assert sum(isinstance(event, TokenEvent) for event in events) == 4


def test_a_child_is_waited_for_without_hang_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGHUP")
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as child:
        assert process._follow(child) == (3, False)
