"""A time limit in all, and the shares of it by which stages end."""

import time
from dataclasses import dataclass, field

#: By which shares of the time the model has written its text, and blocks are calibrated. What is
#: left is PV-Tuning's.
SAMPLED, CALIBRATED = 0.2, 0.6


@dataclass(frozen=True)
class TimeLimit:
    """`seconds` in all from `started` on, a time of time.monotonic."""

    seconds: float
    started: float = field(default_factory=time.monotonic)

    def until(self, share: float = 1.0) -> float:
        """When this share of the time is over."""
        return self.started + share * self.seconds
