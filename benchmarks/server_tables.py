"""The tables of docs/server.md."""

from markdown_table import Row, distinct, table, where


def conformance(rows: list[Row]) -> str:
    """One line per feature, one column per client: the engines that pass; – for no way to ask."""
    clients, engines = distinct(rows, "client"), distinct(rows, "engine")

    def cell(feature: str, client: str) -> str:
        tried = where(rows, feature=feature, client=client)
        if tried and tried[0]["pass"] is None:
            return "–"
        passed = [engine for engine in engines if where(tried, engine=engine, **{"pass": True})]
        said = "both" if len(passed) == len(engines) else ", ".join(passed) or "no"
        return said if tried else ""

    names = distinct(rows, "feature")
    return table(("feature", *clients), ([n, *(cell(n, c) for c in clients)] for n in names))


def _place(result: Row, part: str) -> str:
    """Where a part was measured, and what else went on there."""
    note = result["runs"][part]["note"]
    return f", {result['machine']}{note and ', ' + note}"


def load(result: Row) -> str:
    """The sustained load of one server."""
    load = result["load"]
    first, most, _ = (size / 1e9 for size in load["memory_bytes"])
    growth = load["memory_bytes_per_minute"] / 1e6
    lines = (
        "requests, errors | {requests}, {errors}",
        "tokens per second, per CPU second | {tokens_per_second:.1f}, {tokens_per_cpu_second:.1f}",
        "time to first token, p50 / p95 | {ttft[p50_ms]:.0f} / {ttft[p95_ms]:.0f} ms",
        "time between tokens, p50 / p95 | {itl[p50_ms]:.0f} / {itl[p95_ms]:.0f} ms",
        f"memory at the start, at most | {first:.2f}, {most:.2f} GB",
        f"growth of memory, second half | {growth:.1f} MB/min",
    )
    title = "{streams} streams for {seconds:.0f} s, {engine} engine".format(**load)
    return table((title + _place(result, "load"), ""), (line.format(**load) for line in lines))


def throughput(result: Row) -> str:
    """Tokens per second, and per CPU second, of each server, by requests at once."""
    rows = result["throughput"]
    counts = distinct(rows, "at_once")

    def cell(row: Row) -> str:
        form = "{tokens_per_second:.1f} / {tokens_per_cpu_second:.1f}"
        return "broke" if row["tokens_per_second"] is None else form.format(**row)

    lines = []
    for server in distinct(rows, "server"):
        found = (where(rows, server=server, at_once=count)[0] for count in counts)
        lines.append([server, *map(cell, found)])
    title = f"tokens/s / CPU s, requests at once{_place(result, 'throughput')}"
    return table((title, *counts), lines)


def beside(result: Row) -> str:
    """A short request alone and beside a long prompt."""
    rows = result["beside"]
    names = {"first": "first token", "gap_median": "between tokens", "gap_most": "at most"}

    def cell(when: str, what: str) -> str:
        return "{ms:.0f} / {cpu_ms:.0f}".format(**rows[when][what])

    lines = [[name, cell("alone", key), cell("beside", key)] for key, name in names.items()]
    title = f"ms, wall / CPU{_place(result, 'beside')}"
    return table((title, "alone", f"beside {rows['prompt']:,} tokens"), lines)
