"""Tables of docs/trust.md; `tables.py` writes them."""

from typing import Any

from markdown_table import Row, table

_FAULTS = ("crash", "hang", "traceback", "wrongly accepted")


def mutants(result: Row) -> str:
    """One line per kind of input: tried, refused, accepted, and what should not be."""
    head = ("input", "tried", "refused in a sentence", "accepted rightly", *_FAULTS)
    lines = [
        [name, sum(found.values()), *(found.get(key, 0) for key in ("refused", "accepted"))]
        + [found.get(key, 0) for key in _FAULTS]
        for name, found in result.get("kinds", {}).items()
    ]
    return table(head, lines)


def _ran(found: Row) -> str:
    sets = ", ".join(each.replace(": tested", "") for each in found["instruction_sets"])
    return f"{found['passed']} tests, {found['reports']} reports{f' ({sets})' if sets else ''}"


def abuse(result: Row) -> str:
    """One line per engine: hostile requests tried, what became of them, CPU seconds."""
    head = ("engine", "tried", "answered", "refused", "median CPU s", "slowest", "failed")
    lines = [
        [
            engine,
            *(found[key] for key in ("tried", "answered", "refused", "median_cpu_seconds")),
            f"{found['slowest'][1]} s: {found['slowest'][0]}",
            "; ".join(name for name, *_ in found["failed"]) or "none",
        ]
        for engine, found in result.get("abuse", {}).items()
    ]
    return table(head, lines)


def rest(result: Row) -> str:
    """Kills, full disks, the soak, sanitizers: what was done and what came of it."""
    lines: list[tuple[str, Any]] = []
    if "kills" in result:
        same = f"{result['kills_identical']} of {result['kills_runs']} with the same bytes"
        lines.append((f"{result['kills']} SIGKILLs", f"runs afterwards: {same}"))
    if "writes" in result:
        w = result["writes"]
        said = f"{w['refused']} a sentence, {w['whole']} needed no more, {w['broke']} broke"
        lines.append((f"disk full at {w['points']} writes", f"{said}; {w['identical']} same bytes"))
    if "soak" in result:
        s = result["soak"]
        asked = f"{sum(s['requests'].values())} answers, {s['errors']} errors"
        grown = f"{s['rss_mb_per_minute']:+.2f} MB a minute in the second half"
        files = f"files {s['files'][0]} to {s['files'][-1]}"
        threads = f"threads {s['threads'][0]} to {s['threads'][-1]}"
        name = f"{s['minutes']:g} minutes, {s['streams']} streams"
        lines.append((name, f"{asked}; {grown}, {files}, {threads}"))
    for name, found in result.get("sanitizers", {}).items():
        lines.append((f"sanitizer: {name}", _ran(found)))
    return table((str(result.get("machine", "")), "found"), lines)
