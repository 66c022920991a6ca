"""Tables of docs/gpu.md from what benchmarks/gpu.py found on a card."""

from typing import Any

from markdown_table import Row, table, where


def _title(result: dict[str, Any]) -> str:
    return f"{result['gpu']}, driver {result['driver']}, torch {result['torch']}"


def products(result: dict[str, Any]) -> str:
    """Products with one and four tokens, and how many times faster they are than others."""

    def line(row: Row) -> list[object]:
        out, features = row["layer"]
        return [
            f"{out} x {features}",
            row["tokens"],
            f"{row['microseconds']:.1f}",
            f"{row['of_copy_bandwidth']:.0%}",
            f"{row['over_cublas_fp16']:.2f}",
            f"{row['over_aqlm_cuda']:.2f}" if "over_aqlm_cuda" in row else "",
        ]

    rows = sorted(
        result["rows"]["gemv"], key=lambda r: (r["tokens"], r["layer"][0] * r["layer"][1])
    )
    head = (_title(result), "tokens", "us", "of copying", "over cuBLAS float16", "over aqlm's CUDA")
    return table(head, map(line, rows))


def steps(result: dict[str, Any]) -> str:
    """Whole decoding steps."""
    return table(
        (f"{_title(result)}; context 1024", "weights", "tokens/s", "over float16", "of copying"),
        (
            [
                row["model"],
                row["weights"],
                f"{row['tokens_per_second']:.0f}",
                f"{row['over_float16']:.2f}",
                f"{row['of_copy_bandwidth']:.0%}",
            ]
            for row in result["rows"]["model"]
            if "tokens_per_second" in row
        ),
    )


def batches(result: dict[str, Any]) -> str:
    """The fastest kernel for each number of tokens, against cuBLAS with the dense weight."""
    rows = [row for row in result["rows"]["autotune"] if "timings" in row]
    layers = sorted({(r["out_features"], r["in_features"]) for r in rows})

    def cell(layer: tuple[int, int], tokens: int) -> str:
        found = where(rows, out_features=layer[0], in_features=layer[1], tokens=tokens)
        if not found:
            return ""
        best = min(found[0]["timings"], key=lambda timing: timing["seconds"])
        ratio = best["dense_seconds"] / best["seconds"]
        return f"`{best['config']['kernel']}` {best['seconds'] * 1e6:.1f}, {ratio:.2f}"

    tokens = sorted({row["tokens"] for row in rows})
    head = (f"{_title(result)}; us, and over cuBLAS float16", *(f"{n} tokens" for n in tokens))
    return table(head, ([f"{o} x {i}", *(cell((o, i), n) for n in tokens)] for o, i in layers))
