"""Runs one pvrt command and writes its peaks of GPU memory: `gpu_peaks.py FILE tune MODEL ...`.

FILE gets JSON: the peak of all tensors on the device, and for `tune` peak and seconds of every
stage by the name of its phase in the plan, also when the command fails or is interrupted. Bytes are
those that torch allocates, without CUDA's context.
"""

import atexit
import json
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import plan
import torch


class Peaks:
    """Peaks by phase; a stage inside another counts for itself."""

    def __init__(self, file: Path) -> None:
        self.file, self.gpu = file, torch.cuda.is_available()
        self.phase, self.since = "other", time.monotonic()
        self.peak: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def switch(self, phase: str) -> str:
        """Note what the phase so far took and begin another; returns the one so far."""
        before, now = self.phase, time.monotonic()
        if self.gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            self.peak[before] = max(peak, self.peak.get(before, 0))
            torch.cuda.reset_peak_memory_stats()
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self.since
        self.phase, self.since = phase, now
        return before

    def around(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """A stage that counts for a phase."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            outer = self.switch(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch(outer)

        return counted

    def write(self) -> None:
        """Store what was found so far."""
        self.switch("other")
        found = {"peak_bytes": max(self.peak.values(), default=0)}
        self.file.write_text(json.dumps({**found, "phases": self.peak, "seconds": self.seconds}))


def main() -> None:
    """Run the command with everything behind FILE."""
    # A shell lets what it starts in the background ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    peaks = Peaks(Path(sys.argv[1]))
    sys.argv = ["pvrt", *sys.argv[2:]]
    if sys.argv[1] == "tune":
        for place, name, phase in plan.STAGES:
            module = import_module(place)
            setattr(module, name, peaks.around(getattr(module, name), phase))
    atexit.register(peaks.write)
    from pvrt import cli

    cli.main()


if __name__ == "__main__":
    main()
