"""Progress lines: time left of a long stage."""

import time
from collections.abc import Callable
from typing import Any

from pvrt.progress import Event, clock_time

#: Receives one line of progress, which may be an `Event`.
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

    def left(self) -> float | None:
        """Seconds to the end; None before anything is done."""
        if not self.done:
            return None
        return (time.monotonic() - self.started) / self.done * (self.total - self.done)

    def eta(self) -> str:
        """The time left, for people."""
        left = self.left()
        return "ETA unknown" if left is None else f"ETA {clock_time(left)}"

    def event(self, stage: str, text: str, **figures: Any) -> Event:
        """A line about the stage that ends with the time left."""
        line = f"{text}  {self.eta()}"
        return Event(line, stage, self.done, self.total, self.left(), **figures)
