"""Rows of `pvrt bench`, in llama-bench's columns, as Markdown, JSON or CSV."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from pvrt.tools.bench_model import Memory, Speed

_HEADINGS = (
    *("model", "size", "params", "backend", "threads", "test"),
    *("t/s", "p10", "p90", "ms", "ms p99", "memory"),
)


def row(model: dict[str, Any], speed: Speed, read: Memory | None) -> dict[str, Any]:
    """A row as data.

    model: what its columns say. p10 and p90 of tokens per second are of runs; ms are medians of the
    time to the first token, or from token to token.
    """
    return {
        **model,
        "test": str(speed.test),
        "n_prompt": speed.test.prompt,
        "n_gen": speed.test.new,
        "n_depth": speed.test.depth,
        "tokens_per_second": speed.tokens_per_second,
        "tokens_per_second_p10": speed.rate(0.1),
        "tokens_per_second_p90": speed.rate(0.9),
        "milliseconds": 1000 * speed.wait(0.5),
        "milliseconds_p99": 1000 * speed.wait(0.99),
        "seconds": speed.seconds,
        "joules_per_token": speed.joules_per_token,
        "bytes_per_token": None if read is None else read.bytes_per_token,
        "bytes_per_second": None if read is None else read.bytes_per_second,
        "bandwidth_fraction": None if read is None else read.bandwidth_fraction,
    }


def as_text(rows: Sequence[dict[str, Any]], form: str) -> str:
    """All rows in a form: "md", "json" or "csv"."""
    if form == "json":
        return json.dumps(rows)
    if form == "csv":
        written = io.StringIO()
        table = csv.DictWriter(written, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows({**row, "seconds": " ".join(map(str, row["seconds"]))} for row in rows)
        return written.getvalue().strip()
    cells = [_HEADINGS, *map(_cells, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEADINGS))]
    lines = []
    for name, *rest in cells:
        padded = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([name.ljust(widths[0]), *padded])} |")
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    share = row["bandwidth_fraction"]
    return (
        row["model"],
        f"{row['model_size'] / 1e6:.1f} MB",
        f"{row['model_n_params'] / 1e6:.1f} M",
        row["backend"],
        str(row["n_threads"]),
        row["test"],
        *(f"{row[key]:.1f}" for key in ("tokens_per_second", "tokens_per_second_p10")),
        *(f"{row[key]:.1f}" for key in ("tokens_per_second_p90", "milliseconds")),
        f"{row['milliseconds_p99']:.1f}",
        "" if share is None else f"{share:.0%}",
    )
