"""What a long run looks like: bars on a terminal, lines in a pipe, or JSON for tools."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from pvrt.cli.shared import notice, say
from pvrt.progress import PLAN, WARNING, Event, clock_time


class Course:
    """Where a run is among the stages that its plan has, and how long all of it takes.

    stage: the one at hand.
    """

    def __init__(self) -> None:
        self.stage = ""
        self._planned: dict[str, float] = {}
        self._pace = 1.0  # of this machine now, in times the plan's
        self._until: float | None = None

    def see(self, event: Event) -> bool:
        """Learn from an event; whether a stage of the plan begins with it."""
        if event.phase == PLAN:
            self._planned = event.figures["stages"]
            limit = event.figures["limit"]
            self._until = None if limit is None else time.monotonic() + limit
            return False
        begins = event.phase != self.stage and event.phase in self._planned
        if event.total:
            self.stage = event.phase
        planned = self._planned.get(event.phase, 0.0) * (1 - event.done / max(event.total, 1))
        if event.left is not None and planned > 1:
            self._pace = event.left / planned
        return begins

    def place(self) -> str:
        """The stage, with its number among all."""
        names = list(self._planned)
        if self.stage not in names:
            return self.stage
        return f"phase {names.index(self.stage) + 1} of {len(names)}: {self.stage}"

    def left(self, event: Event) -> float | None:
        """Seconds to the end of all stages: what is planned for the later ones, at the pace of
        this one, and no longer than there is time; None where nothing says.
        """
        names = list(self._planned)
        if event.left is None or event.phase not in names:
            return None
        later = names[names.index(event.phase) + 1 :]
        left = event.left + self._pace * sum(self._planned[name] for name in later)
        return left if self._until is None else max(0.0, min(left, self._until - time.monotonic()))


class Show(StrEnum):
    """Ways to show a run."""

    bars = "bars"
    lines = "lines"
    json = "json"
    quiet = "quiet"


class Terminal:
    """Gets the lines of a run, and shows them. `course` knows where it is."""

    def __init__(self, show: Show) -> None:
        self.course = Course()
        self._show = show
        self._bar: Any = None

    def __call__(self, line: str) -> None:
        """Show a line."""
        event = line if isinstance(line, Event) else Event(line, "")
        begins = self.course.see(event)
        left = self.course.left(event)
        if self._show is Show.json:
            more = {"phase": event.phase, "done": event.done, "total": event.total}
            times = {"left": event.left, "left_in_all": left}
            say(json.dumps({"text": str(line), **more, **times, "figures": event.figures}))
        elif self._show is Show.quiet:
            if event.phase == WARNING:
                notice(f"warning: {line}")
        elif self._show is Show.bars:
            self._draw(event, left)
        else:
            if begins:
                say(self.course.place())
            say(str(line) if left is None else f"{line}  all {clock_time(left)}")

    def _draw(self, event: Event, left: float | None) -> None:
        """Move the bar; lines that say more than how far the stage is go above it."""
        if event.total:
            times = [
                f"{name} {clock_time(seconds)}"
                for name, seconds in (("ETA", event.left), ("all", left))
                if seconds is not None
            ]
            (task,) = self._bar.task_ids
            self._bar.update(
                task,
                description=self.course.place(),
                completed=event.done,
                total=event.total,
                times="  ".join([*_running(event), *times]),
                visible=event.done < event.total,
            )
        if event.figures or not event.total:
            self._bar.console.print(str(event), markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def live(self) -> Iterator[None]:
        """With a bar at the bottom, if it shows one."""
        if self._show is not Show.bars:
            yield
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[times]}", markup=False),
        )
        with Progress(*columns, transient=True) as self._bar:
            self._bar.add_task("", total=1, visible=False, times="")
            yield


def _running(event: Event) -> Iterator[str]:
    """The figure that people watch: held-out KL, or the worst layer of the block."""
    if "held_out_kl" in event.figures:
        yield f"KL {event.figures['held_out_kl']:.4f}"
    if event.figures.get("errors"):
        worst, error = max(event.figures["errors"].items(), key=lambda item: item[1])
        yield f"{worst.rpartition('.')[2]} {error:.3f}"


def chosen(*, as_json: bool, quiet: bool) -> Show:
    """How to show a run here."""
    if as_json:
        return Show.json
    if quiet:
        return Show.quiet
    return Show.bars if sys.stdout.isatty() else Show.lines
