"""A run's folder after a flipped bit, on a full disk, and with another process at work on it."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pvrt.errors import RunError
from pvrt_tune.settings import Recipe, TuneJob
from pvrt_tune.store import RUN_FOLDER, Store, open_store
from tests.server.running import PATIENCE

VERSIONS = {"pvrt": "1", "torch": "2"}
REPORT = {"layers": {"q_proj": {"scheme": "2x8g8", "error": 0.25}}, "dense": ["lm_head"]}


def silent(line: str) -> None:
    pass


def opened(out: Path, **settings: Any) -> Store:
    return open_store(TuneJob("model", out, Recipe(), **settings), {"a": 1}, VERSIONS, silent)


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_in_the_journal_costs_what_comes_after(tmp_path: Path, bit: int) -> None:
    store = opened(tmp_path)
    for name in ("block-0", "block-1"):
        store.save(name, {"codes": torch.arange(4)}, REPORT)
    before, journal = store.events, tmp_path / RUN_FOLDER / "journal.jsonl"
    data = journal.read_bytes()
    for place in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        journal.write_bytes(flipped)
        events = Store(tmp_path / RUN_FOLDER, writes=False).events
        assert events == before[: len(events)], place


def test_a_journal_of_before_has_no_checksums(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"event": "calibrated"}\n')
    Store(tmp_path).note_versions(VERSIONS)
    assert Store(tmp_path).calibrated and Store(tmp_path).versions == [VERSIONS]


@pytest.mark.parametrize("number", range(12))
def test_a_disk_that_is_full_at_any_write_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    left, sync = number, os.fsync

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    def work() -> Store:
        store = opened(tmp_path)
        store.put("config.yaml", b"a: 1\n")
        store.save("block-0", {"codes": torch.arange(4)}, REPORT)
        store.note_calibrated()
        return store

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        try:
            work()
        except RunError as error:
            assert "No space left" in str(error)
        else:
            assert left >= 0  # there was room for all
    assert work().report("block-0") == REPORT


def test_a_second_process_is_told_of_the_first(tmp_path: Path) -> None:
    opened(tmp_path)
    opened(tmp_path)  # the same process may
    code = (
        "import sys; from pathlib import Path; from pvrt_tune.lock import hold\n"
        "try: hold(Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    other = [sys.executable, "-c", code, str(tmp_path / RUN_FOLDER)]
    done = subprocess.run(other, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.startswith(
        f"RunError {tmp_path} is at work already (process {os.getpid()} on"
    )
    opened(tmp_path, restart=True)  # and keeps its lock
    again = subprocess.run(other, capture_output=True, text=True, timeout=PATIENCE)
    assert again.stdout == done.stdout


def test_settings_without_end_make_a_short_sentence(tmp_path: Path) -> None:
    opened(tmp_path)
    file = tmp_path / RUN_FOLDER / "fingerprint.json"
    long = "9" * 5000
    file.write_text(json.dumps({"a": long, long: 1, **{str(i): [long] for i in range(100)}}))
    with pytest.raises(RunError, match="holds another run") as refused:
        opened(tmp_path)
    assert len(str(refused.value)) < 4000


def test_a_process_that_died_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from pvrt_tune.lock import hold\n"
        "hold(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    killed = [sys.executable, "-c", code, str(tmp_path / RUN_FOLDER)]
    assert subprocess.run(killed, timeout=PATIENCE).returncode == -9
    opened(tmp_path)
