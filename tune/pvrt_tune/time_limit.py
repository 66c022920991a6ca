"""A time limit in all, the shares of it by which stages end, and what they cut for it."""

import math
import time
from dataclasses import dataclass, field

#: By which shares of the time the model has written its text, and blocks are calibrated. What is
#: left is PV-Tuning's.
SAMPLED, CALIBRATED = 0.2, 0.6


@dataclass(frozen=True)
class TimeLimit:
    """`seconds` in all from `started` on, a time of time.monotonic; None: no limit."""

    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    def until(self, share: float = 1.0) -> float | None:
        """When this share of the time is over."""
        return None if self.seconds is None else self.started + share * self.seconds

    def over(self, share: float) -> bool:
        """Whether it is."""
        until = self.until(share)
        return until is not None and time.monotonic() > until


@dataclass(frozen=True)
class Cuts:
    """What a plan has time for, as shares: of all work before PV-Tuning, and of the text that the
    model is to write.
    """

    work: float = 1.0
    text: float = 1.0

    @classmethod
    def of(cls, seconds: float, work: float, text: float) -> "Cuts":
        """Of a limit for work that takes so many seconds, in some of which text is written."""
        return cls(
            min(1.0, CALIBRATED * seconds / max(work, 1e-9)),
            min(1.0, SAMPLED * seconds / max(text, 1e-9)),
        )


def part(count: int, share: float, least: int) -> int:
    """A share of `count` things, but `least` of them if there are so many."""
    return min(count, max(least, math.ceil(share * count)))
