"""Lines of progress that bars and tools can read, too."""

from typing import Any

#: Phases of an event that are no stage of a run.
PLAN, WARNING, RESULT = "plan", "warning", "result"


class Event(str):
    """A line for people with what it says as data.

    phase: the stage of a run that goes on, or PLAN (figures: `stages`, the seconds that each is
    planned to take by name; `limit`, seconds in all or None), WARNING, or RESULT. done of total:
    how far the stage is. left: seconds to its end, None where nothing says. figures: what the line
    tells besides; without any it is only a sign of life.
    """

    phase: str
    done: int
    total: int
    left: float | None
    figures: dict[str, Any]

    def __new__(
        cls,
        text: str,
        phase: str,
        done: int = 0,
        total: int = 0,
        left: float | None = None,
        /,
        **figures: Any,
    ) -> "Event":
        """The line `text`."""
        event = super().__new__(cls, text)
        event.phase, event.done, event.total, event.left = phase, done, total, left
        event.figures = figures
        return event


def clock_time(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
