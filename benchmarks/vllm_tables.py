"""Write the tables of docs/vllm.md from benchmarks/results/vllm_*.json.

`python benchmarks/vllm_tables.py`; with --check nothing is written and the exit code says whether
the page is up to date.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "vllm.md"
RESULTS = ROOT / "benchmarks" / "results"
Rows = list[dict[str, Any]]
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
COLUMNS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "float32": lambda row: row["dtype"] == "float32" and _plain(row),
    "bfloat16": lambda row: row["dtype"] == "bfloat16" and _plain(row),
    "float16": lambda row: row["dtype"] == "float16" and _plain(row),
    "TP 2": lambda row: row["tensor_parallel"] == 2,
    "compiled": lambda row: row["compiled"],
}


def _plain(row: dict[str, Any]) -> bool:
    ranks = row["tensor_parallel"] * row["pipeline_parallel"]
    return bool(ranks == 1 and not row["compiled"])


def _cell(rows: Iterable[dict[str, Any]]) -> str:
    results = [row["equal"] for row in rows]
    if not results:
        return ""
    return f"{sum(results)} of {len(results)}"


def verified(rows: Rows) -> str:
    """Equal rows of all rows, per layout and kind, on all versions."""
    lines = [f"| layout | {' | '.join(COLUMNS)} | published |", "|---" * (2 + len(COLUMNS)) + "|"]
    for layout, names in PUBLISHED.items():
        own = [row for row in rows if row["architecture"] == layout]
        cells = [_cell(filter(wanted, own)) for wanted in COLUMNS.values()]
        lines.append(f"| {layout} | {' | '.join(cells)} | {names} |")
    return "\n".join(lines)


def versions(rows: Rows) -> str:
    """Equal rows of all rows, per version of vLLM."""
    lines = ["| vLLM | rows equal | |", "|---|---|---|"]
    for version in sorted({row["vllm"] for row in rows}):
        own = [row for row in rows if row["vllm"] == version]
        note = next((row["note"] for row in own if "note" in row), "")
        lines.append(f"| {version} | {_cell(own)} | {note} |")
    return "\n".join(lines)


def features(rows: Rows) -> str:
    """One line per feature: layouts, and what vLLM counted."""
    lines = ["| feature | layouts, ranks | equal | vLLM's counters |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["feature"] for row in rows):
        own = [row for row in rows if row["feature"] == name]
        where = ", ".join(
            f"{row['architecture']}{' TP 2' if row['tensor_parallel'] == 2 else ''}"
            f"{' compiled' if row['compiled'] else ''}"
            for row in own
        )
        words = ("hits", "accepted_tokens")
        counted = {
            key.removeprefix("vllm:"): value
            for key, value in own[0].get("counters", {}).items()
            if key.endswith(words)
        }
        shown = ", ".join(f"{key} {value:.0f}" for key, value in counted.items())
        lines.append(f"| {name} | {where} | {_cell(own)} | {shown} |")
    return "\n".join(lines)


def load(rows: Rows) -> str:
    """Peak memory above the bare engine, as a ratio to the checkpoint, and seconds."""
    lines = [
        "| scheme | checkpoint | peak above the bare engine | with the mapped file | after loading "
        "| CPU seconds above the bare engine |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = row["with_checkpoint"]["cpu_seconds"] - row["bare_engine"]["cpu_seconds"]
        lines.append(
            f"| {row['scheme']} | {row['checkpoint_bytes'] >> 20} MiB | "
            f"{row['peak_anonymous_over_checkpoint']:.2f}x | "
            f"{row['peak_all_over_checkpoint']:.2f}x | "
            f"{row['after_anonymous_over_checkpoint']:.2f}x | {seconds:.1f} |"
        )
    return "\n".join(lines)


def bench(rows: Rows) -> str:
    """One line per benchmark and mode: two bits beside bfloat16."""
    lines = [
        "| SmolLM2-135M | 2x8g8 tokens/s | bfloat16 tokens/s | ratio | CPU seconds | memory MiB |",
        "|---|---|---|---|---|---|",
    ]
    keys = sorted({(row["bench"], row["compiled"]) for row in rows})
    for name, compiled in keys:
        pair = {
            row["model"]: row for row in rows if (row["bench"], row["compiled"]) == (name, compiled)
        }
        if len(pair) < 2:
            continue
        ours, theirs = pair["2x8g8"], pair["bfloat16"]
        speed = "output_throughput" if name == "serve" else "tokens_per_second"
        both = [
            f"{ours[key]} and {theirs[key]}" if key in ours else ""
            for key in ("cpu_seconds", "memory_mib")
        ]
        mode = "compiled" if compiled else "eager"
        shared = "" if max(row.get("others", 1) for row in (ours, theirs)) <= 0.1 else " (shared)"
        lines.append(
            f"| {name}, {mode}{shared} | {ours[speed]:.1f} | {theirs[speed]:.1f} | "
            f"{ours[speed] / theirs[speed]:.2f}x | {both[0]} | {both[1]} |"
        )
    return "\n".join(lines)


def experts(measured: dict[str, Any]) -> str:
    """One line per number of tokens: milliseconds of one block of experts, dense and in codes."""
    names = list(dict.fromkeys(row["weights"] for row in measured["rows"]))
    lines = [f"| tokens | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for tokens in dict.fromkeys(row["tokens"] for row in measured["rows"]):
        own = {row["weights"]: row for row in measured["rows"] if row["tokens"] == tokens}
        cells = [
            f"{own[name]['cpu_ms']:.1f} ms"
            + ("" if name == "bfloat16" else f", {own[name]['speed']:.2f}x")
            for name in names
        ]
        lines.append(f"| {tokens} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "verified": ("vllm_matrix", verified),
    "versions": ("vllm_matrix", versions),
    "features": ("vllm_features", features),
    "load": ("vllm_load", load),
    "bench": ("vllm_bench", bench),
    "experts": ("vllm_experts", experts),
}


def filled(text: str) -> str:
    """The page with all tables that have results."""
    for name, (file, table) in TABLES.items():
        source = RESULTS / f"{file}.json"
        if not source.is_file():
            continue
        body = table(json.loads(source.read_text()))
        marked = f"<!-- {name}:begin -->\n{body}\n<!-- {name}:end -->"
        pattern = rf"<!-- {name}:begin -->.*?<!-- {name}:end -->"
        text, count = re.subn(pattern, lambda _, new=marked: new, text, flags=re.DOTALL)  # type: ignore[misc]
        assert count == 1, f"{PAGE} has no place for the table {name}"
    return text


def main() -> int:
    """Write the page, or check it."""
    text = PAGE.read_text(encoding="utf-8")
    new = filled(text)
    if "--check" in sys.argv[1:]:
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
