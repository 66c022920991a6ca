"""Result files, benchmarks/results/NAME.json: one row a line, so that a diff shows what changed."""

import json
from collections.abc import Iterable
from typing import Any

import machine

from pvrt.format.atomic import write_synced

FOLDER = machine.ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def load(name: str) -> Any:
    """What a file holds; no rows where there is none yet."""
    file = FOLDER / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def store(name: str, value: Any) -> None:
    """Write a list of rows, or an object whose values may be such lists."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = _lines(value)
    if isinstance(value, dict):
        text = ",\n ".join(f"{json.dumps(key)}: {_lines(each)}" for key, each in value.items())
        text = f"{{\n {text}\n}}"
    write_synced(FOLDER / f"{name}.json", f"{text}\n".encode())


def renewed(rows: Iterable[Row], fresh: Iterable[Row], *keys: str) -> list[Row]:
    """All rows, each fresh one in the place of those that are about the same `keys`."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in keys)

    fresh = list(fresh)
    replaced = {key(row) for row in fresh}
    return [*(row for row in rows if key(row) not in replaced), *fresh]


def _lines(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n " + ",\n ".join(map(json.dumps, value)) + "\n]"
    return json.dumps(value)
