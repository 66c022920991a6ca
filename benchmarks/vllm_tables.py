"""The tables of docs/vllm.md; `tables.py` writes them."""

from markdown_table import Row, distinct, formatted, table, where

#: What is on the hub, by layout; "-AQLM-..." of ISTA-DASLab where nobody else is named.
PUBLISHED = {
    "llama-2": "Llama-2-7b, 13b, 70b; Llama-3-8B, 70B and -Instruct: 1x16g8, 2x8g8, 1x16g16, "
    "1x8g8, 8x8g32",
    "llama-3.1": "Llama-3.1-8B, 70B and -Instruct: 1x16g8, 2x8g8, 1x16g16; kennedyian94's: 2x8g8",
    "llama-3.2": "Llama-3.2-1B, 3B and -Instruct: 2x8g8",
    "mistral": "Mistral-7B-v0.1, -Instruct-v0.2: 1x16g8, 2x8g8",
    "mistral-nemo": "Mistral-Nemo-Instruct-2407: 1x16g8",
    "mixtral": "Mixtral-8x7b, -Instruct: 1x16g8",
    "gemma": "gemma-2b: 1x16g8, 2x8g8",
    "gemma-2": "none known",
    "phi-3": "Phi-3-mini-4k-instruct, Phi-3-medium-4k-instruct: 1x16g8, 1x16g16",
    "phi-3-128k": "Phi-3-mini-128k-instruct: 1x16g8",
    "qwen2": "Qwen2-72B, -Instruct: 1x16g8, 1x16g16; kennedyian94's Qwen2.5-3B: 2x8g8",
    "qwen2-moe": "none known",
    "command-r": "c4ai-command-r-v01, -plus: 1x16g8",
}
_ONE_RANK = {"tensor_parallel": 1, "compiled": False}
COLUMNS: dict[str, Row] = {
    **{dtype: {"dtype": dtype, **_ONE_RANK} for dtype in ("float32", "bfloat16", "float16")},
    "TP 2": {"tensor_parallel": 2},
    "compiled": {"compiled": True},
}


def _equal(rows: list[Row]) -> str:
    return f"{sum(row['equal'] for row in rows)} of {len(rows)}" if rows else ""


def layouts(rows: list[Row]) -> str:
    """Equal rows of all rows, per layout and kind, on all versions."""
    lines = (
        [
            layout,
            *(_equal(where(rows, architecture=layout, **kind)) for kind in COLUMNS.values()),
            names,
        ]
        for layout, names in PUBLISHED.items()
    )
    return table(("layout", *COLUMNS, "published"), lines)


def versions(rows: list[Row]) -> str:
    """Equal rows of all rows, per version of vLLM."""
    lines = []
    for version in sorted(distinct(rows, "vllm")):
        own = where(rows, vllm=version)
        lines.append([version, _equal(own), next((r["note"] for r in own if "note" in r), "")])
    return table(("vLLM", "rows equal", ""), lines)


def features(rows: list[Row]) -> str:
    """One line per feature: layouts, and what vLLM counted."""
    lines = []
    for name in distinct(rows, "feature"):
        own = where(rows, feature=name)
        places = ", ".join(
            row["architecture"]
            + (" TP 2" if row["tensor_parallel"] == 2 else "")
            + (" compiled" if row["compiled"] else "")
            for row in own
        )
        counted = ", ".join(
            f"{key.removeprefix('vllm:')} {value:.0f}"
            for key, value in own[0].get("counters", {}).items()
            if key.endswith(("hits", "accepted_tokens"))
        )
        lines.append([name, places, _equal(own), counted])
    return table(("feature", "layouts, ranks", "equal", "vLLM's counters"), lines)


def load(rows: list[Row]) -> str:
    """Peak memory above the bare engine, as a ratio to the checkpoint, and seconds."""
    both = [
        (row["with_checkpoint"]["cpu_seconds"], row["bare_engine"]["cpu_seconds"]) for row in rows
    ]
    return formatted(
        "scheme | checkpoint | peak above the bare engine | with the mapped file | after loading | "
        "CPU seconds above the bare engine",
        "{scheme} | {mib} MiB | {peak_anonymous_over_checkpoint:.2f}x | "
        "{peak_all_over_checkpoint:.2f}x | {after_anonymous_over_checkpoint:.2f}x | {more:.1f}",
        (
            {**row, "mib": row["checkpoint_bytes"] >> 20, "more": loaded - bare}
            for row, (loaded, bare) in zip(rows, both, strict=True)
        ),
    )


def bench(rows: list[Row]) -> str:
    """One line per benchmark and mode: two bits beside bfloat16."""
    lines = []
    for name, compiled in sorted({(row["bench"], row["compiled"]) for row in rows}):
        pair = where(rows, bench=name, compiled=compiled)
        ours, theirs = (where(pair, model=model) for model in ("2x8g8", "bfloat16"))
        if not (ours and theirs):
            continue
        rates = [row["tokens_per_second"] for row in (*ours, *theirs)]
        both = (
            f"{ours[0][key]} and {theirs[0][key]}" if key in ours[0] else ""
            for key in ("cpu_seconds", "memory_mib")
        )
        mode = "compiled" if compiled else "eager"
        shared = " (shared)" if any(row["shared_machine"] for row in pair) else ""
        ratio = f"{rates[0] / rates[1]:.2f}x"
        lines.append([f"{name}, {mode}{shared}", *(f"{rate:.1f}" for rate in rates), ratio, *both])
    head = ("2x8g8 tokens/s", "bfloat16 tokens/s", "ratio", "CPU seconds", "memory MiB")
    return table(("SmolLM2-135M", *head), lines)


def experts(measured: Row) -> str:
    """One line per number of tokens: milliseconds of one block of experts, dense and in codes."""
    rows = measured["rows"]
    names = distinct(rows, "weights")

    def cell(tokens: int, name: str) -> str:
        (row,) = where(rows, tokens=tokens, weights=name)
        return f"{row['cpu_ms']:.1f} ms" + ("" if name == "bfloat16" else f", {row['speed']:.2f}x")

    lines = ([n, *(cell(n, name) for name in names)] for n in distinct(rows, "tokens"))
    return table(("tokens", *names), lines)
