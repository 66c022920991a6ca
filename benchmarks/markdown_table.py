"""Markdown of a table, and rows by what they are about."""

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
Cells = str | Iterable[object]  # of one line; a string has them joined already


def table(head: Cells, rows: Iterable[Cells]) -> str:
    """Markdown of a table."""
    first, *rest = (
        f"| {line if isinstance(line, str) else ' | '.join(map(str, line))} |"
        for line in (head, *rows)
    )
    return "\n".join([first, "|---" * first.count(" | ") + "|---|", *rest])


def formatted(head: str, form: str, rows: Iterable[Row]) -> str:
    """A table with one line per row, all of one form."""
    return table(head, (form.format(**row) for row in rows))


def distinct(rows: Iterable[Row], key: str) -> list[Any]:
    """Values of a key in their first order."""
    return list(dict.fromkeys(row[key] for row in rows))


def where(rows: Iterable[Row], **values: object) -> list[Row]:
    """Rows that have these values."""
    return [row for row in rows if all(row.get(key) == v for key, v in values.items())]
