"""Progress lines: time left of a long stage."""

import time
from collections.abc import Callable

#: Receives one line of progress.
Report = Callable[[str], None]


class Clock:
    """Time left, from the mean of what was done so far."""

    def __init__(self, total: int, every: float = 10.0) -> None:
        self.total, self.every, self.done = total, every, 0
        self.started = self.last = time.monotonic()

    def due(self) -> bool:
        """Whether `every` seconds have passed since this last said so."""
        now = time.monotonic()
        if now - self.last < self.every:
            return False
        self.last = now
        return True

    def eta(self) -> str:
        if not self.done:
            return "ETA unknown"
        left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        return f"ETA {int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
