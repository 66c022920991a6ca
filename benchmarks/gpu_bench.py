"""What the sections of gpu.py share: the device, the time left, rows that are stored at once."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pvrt.tools.bench_kernels import Clock, copy_bandwidth
from pvrt_kernels.gpu.choose import Shape

TWO_BIT = (2, 256, 8)
Row = dict[str, Any]
Case = TypeVar("Case")


@dataclass
class Bench:
    """One section: where it runs, until when (`time.time`), and where its rows go."""

    section: str
    device: torch.device
    dry: bool
    deadline: float
    rows_file: Path
    failed: int = field(default=0, init=False)

    @property
    def clock(self) -> Clock:
        """For medians on this device."""
        return Clock(self.device)

    @property
    def left(self) -> float:
        """Seconds until this section should end by itself."""
        return self.deadline - time.time()

    def row(self, **values: Any) -> None:
        """Append a row to the file, at once: a process that is killed keeps it."""
        with self.rows_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"section": self.section, **values}, default=str) + "\n")

    def each(self, cases: Sequence[Case], measure: Callable[[Case], None]) -> None:
        """Measure case after case while there is time; what raises or is not reached is a row.

        Raises what a case raised when it spoiled the CUDA context, for all that follows would too.
        """
        for number, case in enumerate(cases):
            if self.left < 0:
                self.row(not_reached=[str(each) for each in cases[number:]])
                return
            try:
                measure(case)
            except Exception as error:
                self.failed += 1
                self.row(case=str(case), error=f"{type(error).__name__}: {str(error)[:500]}")
            if self.device.type == "cuda":
                self._check_context([str(each) for each in cases[number + 1 :]])

    def _check_context(self, following: list[str]) -> None:
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except Exception:
            self.row(not_reached=following)
            raise

    @cached_property
    def copy_rate(self) -> float:
        """Bytes per second, read and written: of section `ceilings`, or measured now."""
        if self.rows_file.is_file():
            for line in self.rows_file.read_text(encoding="utf-8").splitlines():
                rate = json.loads(line).get("copy_bytes_per_second")
                if rate is not None:
                    return float(rate)
        return copy_bandwidth(self.device)

    def some(self, real: tuple[Any, ...], tiny: tuple[Any, ...]) -> tuple[Any, ...]:
        """What to measure: the real shapes, or tiny ones in a dry run."""
        return tiny if self.dry else real

    def x(self, tokens: int, features: int, dtype: torch.dtype = torch.float16) -> Tensor:
        """Random activations."""
        return torch.randn(tokens, features, device=self.device).to(dtype)


def rate(bench: Bench, shape: Shape, config: Row, seconds: float) -> Row:
    """The record of a product's time: bytes are those of the codes."""
    read = shape.blocks * 16 * shape.out_features / seconds
    return {
        "scheme": shape.scheme,
        "layer": [shape.out_features, shape.in_features],
        "config": config,
        "microseconds": seconds * 1e6,
        "code_bytes_per_second": read,
        "of_copy_bandwidth": read / bench.copy_rate,
    }
