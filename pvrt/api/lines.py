"""Lines of progress of the API's functions."""

import time
from collections.abc import Callable

from pvrt.progress import Event

#: Receives one line.
Tell = Callable[[str], None]

_EVERY_SECONDS = 10.0  # between lines of one pass


def silent(line: str) -> None:
    """What gets the lines that nobody asked for."""


def passes(tell: Tell) -> Callable[[str], Callable[..., None]]:
    """Lines about long passes, each asked for by its name: what is done of it, how long the rest
    takes, and a figure so far, if there is one.
    """

    def begun(what: str) -> Callable[..., None]:
        started = last = time.monotonic()

        def show(done: int, total: int, figure: float | None = None) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > _EVERY_SECONDS or done == total:
                shown = "" if figure is None else f"  {figure:.3f}"
                left = (now - started) / done * (total - done)
                line = f"{what}: {done}/{total}{shown}  {left:.0f} s left"
                tell(Event(line, what, done, total, left))
                last = now

        return show

    return begun
