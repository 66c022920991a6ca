"""The table of architectures (architectures.py)."""

import re

from markdown_table import Row, table

_STEPS = ("tune", "load_equal", "engine", "vllm", "grid")


def is_green(row: Row) -> bool:
    """Whether an architecture does all: what plan refuses in a sentence is no failure of grids."""
    done = all(row[step] is True for step in ("tune", "load_equal", "engine"))
    return done and row["vllm"] in (True, None) and row["grid"] in (True, "refused")


def architectures(rows: list[Row]) -> str:
    """How many there are, and one line per architecture."""
    green = [row for row in rows if is_green(row)]
    refused = [row for row in rows if row["plan"] == "refused"]
    served = sum(row["vllm"] is True for row in rows)
    others = len(rows) - len(green) - len(refused)
    summary = (
        f"{len(rows)} architectures: {len(green)} are tuned, load and are served, {len(refused)} "
        f"are refused by `pvrt plan` in one sentence, {others} are neither; vLLM serves {served}."
    )
    head = ("architecture", "tune", "transformers", "engine", "vLLM", "grid", "what is said")
    lines = [[row["architecture"], *(_word(row[s]) for s in _STEPS), _said(row)] for row in rows]
    return f"{summary}\n\n{table(head, lines)}"


def _word(value: bool | str | None) -> str:
    return {True: "yes", False: "**no**", None: ""}.get(value, str(value))  # type: ignore[arg-type]


def _said(row: Row) -> str:
    said = re.sub(r"^(plan|grid): ", "", row["message"])
    return said.replace("|", "\\|")
