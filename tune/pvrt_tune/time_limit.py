"""A time limit in all, and the shares of it by which stages end."""

import math
import time
from dataclasses import dataclass, field

#: By which shares of the time the model has written its text, and blocks are calibrated. What is
#: left is PV-Tuning's.
SAMPLED, CALIBRATED = 0.2, 0.6


@dataclass(frozen=True)
class TimeLimit:
    """`seconds` in all from `started` on, a time of time.monotonic; None: no limit.

    share: of the work before PV-Tuning, what there is time for by the plan.
    """

    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)
    share: float = 1.0

    def until(self, share: float = 1.0) -> float | None:
        """When this share of the time is over."""
        return None if self.seconds is None else self.started + share * self.seconds

    def over(self, share: float) -> bool:
        """Whether it is."""
        until = self.until(share)
        return until is not None and time.monotonic() > until

    def of(self, count: int, least: int) -> int:
        """How many of `count` things there is time for, but `least` if there are so many."""
        return min(count, max(least, math.ceil(self.share * count)))
