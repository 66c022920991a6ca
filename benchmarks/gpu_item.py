"""One item of gpu_product.py: where it runs, its checks, and the commands that it gives."""

import json
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent


@dataclass
class Item:
    """Where an item runs and what it finds."""

    name: str
    folder: Path
    device: str
    dry: bool
    model: str | None
    text: Path
    found: dict[str, Any] = field(default_factory=lambda: {"figures": {}, "failures": {}})
    lock: threading.RLock = field(default_factory=threading.RLock)

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """A part of the item: its seconds are noted, and how it failed."""
        started = time.monotonic()
        print(f"--- {name}", flush=True)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            lines = "".join(traceback.format_exception(error)).splitlines()
            self.found["failures"][name] = [line[:400] for line in lines[-40:]]
        self.note(seconds={name: time.monotonic() - started})

    def note(self, **figures: Any) -> None:
        """Keep figures; mappings are merged. The file is written at once."""
        with self.lock:
            kept = self.found["figures"]
            for name, value in figures.items():
                both = isinstance(value, dict) and isinstance(kept.get(name), dict)
                kept[name] = {**kept[name], **value} if both else value
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                kept["own_peak_bytes"] = torch.cuda.max_memory_allocated()
            (self.folder / f"{self.name}.json").write_text(json.dumps(self.found))

    def some(self, real: Any, dry: Any) -> Any:
        """What to do: the real thing, or less in a dry run."""
        return dry if self.dry else real

    def pvrt(self, step: str, *arguments: object, interrupt: str = "", code: int = 0) -> str:
        """The output of a pvrt command in a process of its own; AssertionError unless it ends with
        `code`. Gets Ctrl-C after the first line that begins with `interrupt`.
        """
        peaks, errors = (self.folder / f"{self.name}-{step}{end}" for end in (".peaks", ".err"))
        command = [sys.executable, str(HERE / "gpu_peaks.py"), str(peaks), *map(str, arguments)]
        print("$ pvrt", *arguments, flush=True)
        started, lines = time.monotonic(), []
        with errors.open("w") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
                if interrupt and line.startswith(interrupt):
                    interrupt = ""
                    process.send_signal(signal.SIGINT)
            process.wait()
        complaint = errors.read_text(errors="replace")[-8000:]
        print(complaint, flush=True)
        if peaks.is_file():
            found = json.loads(peaks.read_text())
            self.note(commands={step: found}, peak_bytes={step: found["peak_bytes"]})
        self.note(command_seconds={step: time.monotonic() - started})
        last = "".join(lines[-10:]) + complaint
        assert process.returncode == code, f"exit code {process.returncode}, not {code}\n{last}"
        return "".join(lines)

    def toy(self, name: str) -> Path:
        """A checkpoint that the item `toy` made."""
        return self.folder / "toys" / name
