"""Write the tables of README.md and of pages in docs/ from benchmarks/results/*.json.

    python benchmarks/tables.py

With --check nothing is written and the exit code says whether they are up to date.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = (
    README,
    *(ROOT / "docs" / name for name in ("tuning.md", "server.md", "engine.md", "cpu.md", "gpu.md")),
)
RESULTS = ROOT / "benchmarks" / "results"


def first_run(result: dict[str, Any]) -> str:
    """The table of the first real run; what was not measured yet has no line."""
    rows = {
        "wikitext2_ppl_original": "WikiText-2 test perplexity @ 2048, original | {:.2f}",
        "wikitext2_ppl_2bit": "WikiText-2 test perplexity @ 2048, tuned | {:.2f}",
        "bits_per_weight_linears": "bits per weight, quantised linears | {:.3f}",
        "bits_per_weight_file": "bits per weight, whole file | {:.3f}",
        "tokens_per_second": "tokens per second, embedded engine | {:.1f}",
        "quickstart_seconds": "`make quickstart`, packages installed | {:.0f} s",
        "test_seconds": "`make test`, packages installed | {:.0f} s",
        "tests_passed": "tests passed | {}",
    }
    lines = [f"| SmolLM2-135M-Instruct, {result['scheme']}, {result['machine']} | |", "|---|---|"]
    lines += [f"| {row.format(result[key])} |" for key, row in rows.items() if key in result]
    return "\n".join(lines)


def calibration_layers(rows: list[dict[str, Any]]) -> str:
    """One line per layer: the reference, then every effort, as error and CPU seconds."""
    rows = [row for row in rows if "effort" in row]
    efforts = list(dict.fromkeys(row["effort"] for row in rows))
    lines = [f"| SmolLM2-135M, {rows[0]['scheme']} | reference | {' | '.join(efforts)} |"]
    lines.append("|---" * (2 + len(efforts)) + "|")
    for layer in dict.fromkeys(row["layer"] for row in rows):
        own = {row["effort"]: row for row in rows if row["layer"] == layer}
        first = own[efforts[0]]
        reference = (first["reference_relative_error"], first["reference_cpu_seconds"])
        pairs = [reference, *((own[e]["relative_error"], own[e]["cpu_seconds"]) for e in efforts)]
        cells = " | ".join(f"{error:.4f}, {seconds:.1f} s" for error, seconds in pairs)
        lines.append(f"| {layer.removeprefix('model.layers.')} | {cells} |")
    return "\n".join(lines)


def grids(rows: list[dict[str, Any]]) -> str:
    """One line per grid: error of every layer, and its ratio to plain GPTQ's."""
    rows = [row for row in rows if row.get("part") == "grids"]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    names = " | ".join(layer.removeprefix("model.layers.") for layer in layers)
    lines = [f"| SmolLM2-135M | {names} |", "|---" * (1 + len(layers)) + "|"]
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        own = {row["layer"]: row for row in rows if row["scheme"] == scheme}
        cells = [
            f"{own[layer]['relative_error']:.4f}, {own[layer]['ratio_to_gptq']:.2f} of GPTQ"
            if layer in own
            else "does not divide"
            for layer in layers
        ]
        lines.append(f"| {scheme} | {' | '.join(cells)} |")
    return "\n".join(lines)


def calibration_ablation(rows: list[dict[str, Any]]) -> str:
    """What each part of calibration is worth over the whole model."""
    measured = [row for row in rows if row["variant"] != "original"]
    lines = [
        f"| SmolLM2-135M, {measured[0]['scheme']}, effort {measured[0]['effort']} | "
        "perplexity | mean layer error | CPU seconds |",
        "|---|---|---|---|",
    ]
    original = next(row for row in rows if row["variant"] == "original")
    lines.append(f"| original model | {original['perplexity']:.2f} | | |")
    for row in measured:
        lines.append(
            f"| {row['variant']} | {row['perplexity']:.2f} | {row['mean_layer_error']:.4f} | "
            f"{row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def pv_strategies(rows: list[dict[str, Any]]) -> str:
    """What each strategy reaches from the same calibrated model: medians over seeds."""
    texts = ("tinystories_ppl", "wikitext2_ppl", "second_ppl")
    names = {"tinystories_ppl": "TinyStories", "wikitext2_ppl": "WikiText-2", "second_ppl": "C4"}
    lines = [
        "| model, scheme | strategy | steps x tokens | held-out KL (range of the seeds) | "
        "perplexity | share of the gap in log perplexity closed | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]

    def perplexities(group: list[dict[str, Any]]) -> dict[str, float]:
        return {text: median(row[text] for row in group) for text in texts if text in group[0]}

    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        name = row["strategy"] + (", an hour's run" if row.get("run") == "hour" else "")
        key = (row["model"], row["representation"], name)
        groups.setdefault(key, []).append(row)
    # All of a scheme together, in one order of strategies, however the rows came in.
    schemes = list(dict.fromkeys(key[:2] for key in groups))
    strategies = list(dict.fromkeys(key[2] for key in groups))
    order = {key: (schemes.index(key[:2]), strategies.index(key[2])) for key in groups}
    for model, scheme, strategy in sorted(groups, key=order.__getitem__):
        group = groups[model, scheme, strategy]
        reached = perplexities(group)
        said = ", ".join(f"{names[text]} {value:.2f}" for text, value in reached.items())
        if "heldout_kl" not in group[0]:
            lines.append(f"| {model}, {scheme} | {strategy} | | | {said} | | |")
            continue
        best = perplexities(groups[model, "float", "original"])
        start = perplexities(groups[model, scheme, "calibration only"])
        closed = ", ".join(
            f"{math.log(start[text] / value) / math.log(start[text] / best[text]):.0%}"
            for text, value in reached.items()
        )
        kls = [row["heldout_kl"] for row in group]
        seeds = f" ({min(kls):.4f} to {max(kls):.4f})" if len(kls) > 1 else ", one seed"
        steps, tokens = group[0]["steps"], group[0]["tokens"] // group[0]["steps"]
        lines.append(
            f"| {model}, {scheme} | {strategy} | {steps} x {tokens} | {median(kls):.4f}{seeds} | "
            f"{said} | {closed} | {median(row['cpu_seconds'] for row in group):.0f} |"
        )
    return "\n".join(lines)


def pv_step(rows: list[dict[str, Any]]) -> str:
    """Time of one tuning step and the share of its V step."""
    lines = [
        "| model, scheme | threads | tokens a step | seconds | tokens/s | share of the V step |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']}, {row['scheme']} | {row['threads']} | {row['tokens_per_step']} | "
            f"{row['seconds']:.1f} | {row['tokens_per_second']:.0f} | {row['v_share']:.1%} |"
        )
    return "\n".join(lines)


def cpu_kernels(rows: list[dict[str, Any]]) -> str:
    """Microseconds of one product per kernel and shape, and the largest error; by threads."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    counts = sorted({row["threads"] for row in rows})
    threads = " / ".join(map(str, counts))
    lines = [f"| us, {threads} threads of {rows[0]['machine']} | {' | '.join(shapes)} | error |"]
    lines.append("|---" * (2 + len(shapes)) + "|")
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        own = [row for row in rows if row["kernel"] == kernel]
        cells = []
        for shape in shapes:
            times = {r["threads"]: f"{r['microseconds']:.0f}" for r in own if r["shape"] == shape}
            cells.append(" / ".join(times.get(n, "-") for n in counts) if times else "")
        errors = {n: [row["relative_error"] for row in own if row["threads"] == n] for n in counts}
        worst = (f"{max(found):.1e}" if found else "-" for found in errors.values())
        lines.append(f"| {kernel} | {' | '.join(cells)} | {' / '.join(worst)} |")
    return "\n".join(lines)


def gpu_interpreter(result: dict[str, Any]) -> str:
    """Largest relative error by kernel and scheme."""
    schemes = list(dict.fromkeys(row["scheme"] for row in result["rows"]))
    lines = [
        f"| largest relative error, float16 | {' | '.join(schemes)} |",
        "|---|" + "---|" * len(schemes),
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in result["rows"]):
        cells = []
        for scheme in schemes:
            errors = [
                row["error"]
                for row in result["rows"]
                if (row["kernel"], row["scheme"]) == (kernel, scheme)
            ]
            cells.append(f"{max(errors):.1e}" if errors else "")
        lines.append(f"| `{kernel}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def kernels_aot(rows: list[dict[str, Any]]) -> str:
    """Extremes over the binaries of a kernel and an architecture, the newest Triton's."""
    newest = max((row["triton"] for row in rows), key=lambda v: tuple(map(int, v.split("."))))
    versions = sorted({row["triton"] for row in rows})
    archs = sorted({row["arch"] for row in rows}, key=lambda arch: int(arch[3:]))
    spilt = max(row["spill_bytes"] for row in rows)
    lines = [
        f"| {len(rows)} binaries, Triton {' and '.join(versions)}, spills {spilt} bytes; "
        f"registers, KiB shared of {newest} | {' | '.join(archs)} |",
        "|---|" + "---|" * len(archs),
    ]
    binaries: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["triton"] == newest:
            binaries.setdefault((row["kernel"].split()[0], row["arch"]), []).append(row)
    for kernel in sorted({kernel for kernel, _ in binaries}):
        cells = []
        for arch in archs:
            own = binaries.get((kernel, arch), [])
            most = max((row["registers"] for row in own), default=0)
            shared = max((row["shared_bytes"] for row in own), default=0)
            cells.append(f"{most}, {shared / 1024:.0f}" if own else "")
        lines.append(f"| `{kernel}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def calibration_shapes(rows: list[dict[str, Any]]) -> str:
    """One line per layer."""
    lines = ["| layer | scheme | relative error | CPU seconds |", "|---|---|---|---|"]
    for row in rows:
        if row["measured"]:
            shape = " x ".join(map(str, row["shape"]))
            error, seconds = row["relative_error"], row["cpu_seconds"]
            lines.append(f"| {shape} | {row['scheme']} | {error:.4f} | {seconds:.0f} |")
    return "\n".join(lines)


def plan(rows: list[dict[str, Any]]) -> str:
    """One line per run, one column per phase: measured peak, and predicted over measured."""
    phases = ("sampling", "block pass", "layer fit", "block fine-tune", "PV-Tuning", "write")
    lines = [f"| predicted / measured | {' | '.join(phases)} |", "|---" * (1 + len(phases)) + "|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {row["phase"]: row for row in rows if row["model"] == model}
        cells = [
            f"{own[p]['ratio']:.2f} of {own[p]['measured_bytes'] / 1e6:.0f} MB" if p in own else ""
            for p in phases
        ]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cpu_decode(rows: list[dict[str, Any]]) -> str:
    """One line per model, engine, format and number of threads."""
    head = "bits | threads | tokens/s | first token of 512, s | share of bandwidth"
    lines = [f"| {rows[0]['machine']} | format | {head} |", "|---" * 7 + "|"]
    for row in sorted(rows, key=lambda row: (row["model"], row["threads"])):
        lines.append(
            f"| {row['model']}, {row['engine']} | {row['format']} | {row['bits']:.2f} | "
            f"{row['threads']} | {row['decode_tokens_per_s']:.1f} | {row['ttft_512_s']:.2f} | "
            f"{row['bandwidth_fraction']:.2f} |"
        )
    return "\n".join(lines)


def server_conformance(rows: list[dict[str, Any]]) -> str:
    """One line per feature, one column per client: the engines that pass."""
    clients = list(dict.fromkeys(row["client"] for row in rows))
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    lines = [f"| feature | {' | '.join(clients)} |", "|---" * (1 + len(clients)) + "|"]
    for feature in dict.fromkeys(row["feature"] for row in rows):
        own = [row for row in rows if row["feature"] == feature]
        cells = []
        for client in clients:
            tried = {row["engine"]: row["pass"] for row in own if row["client"] == client}
            passed = [engine for engine in engines if tried.get(engine)]
            said = "both" if len(passed) == len(engines) else ", ".join(passed) or "no"
            cells.append(said if tried else "")
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return "\n".join(lines)


def server_load(result: dict[str, Any]) -> str:
    """The sustained load of one server."""
    load = result.get("load")
    if load is None:
        return "Not measured yet."
    rows = {
        "requests, errors": f"{load['requests']}, {load['errors']}",
        "tokens per second": f"{load['tokens_per_second']:.1f}",
        "time to first token, p50 / p95": "{p50_ms:.0f} / {p95_ms:.0f} ms".format(**load["ttft"]),
        "time between tokens, p50 / p95": "{p50_ms:.0f} / {p95_ms:.0f} ms".format(**load["itl"]),
        "memory at the start, at most": "{:.2f}, {:.2f} GB".format(
            *(size / 1e9 for size in load["memory_bytes"])
        ),
        "growth of memory, second half": f"{load['memory_bytes_per_minute'] / 1e6:.1f} MB/min",
    }
    title = f"{load['streams']} streams for {load['seconds']:.0f} s, {load['engine']} engine"
    lines = [f"| {title}, {result['machine']} | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])


def server_throughput(result: dict[str, Any]) -> str:
    """Tokens per second of each server, by requests at once."""
    rows = result.get("throughput")
    if rows is None:
        return "Not measured yet."
    counts = list(dict.fromkeys(row["at_once"] for row in rows))
    lines = [f"| tokens/s, requests at once | {' | '.join(map(str, counts))} |"]
    lines.append("|---" * (1 + len(counts)) + "|")
    for server in dict.fromkeys(row["server"] for row in rows):
        rates = {r["at_once"]: r["tokens_per_second"] for r in rows if r["server"] == server}
        cells = (f"{rates[n]:.1f}" if rates[n] is not None else "broke" for n in counts)
        lines.append(f"| {server} | {' | '.join(cells)} |")
    return "\n".join(lines)


#: Tables by the name between their markers; before a colon it is the result file's.
TABLES: dict[str, Callable[[Any], str]] = {
    "first_run": first_run,
    "calibration_layers": calibration_layers,
    "calibration_layers:grids": grids,
    "calibration_ablation": calibration_ablation,
    "calibration_shapes": calibration_shapes,
    "plan": plan,
    "pv_strategies": pv_strategies,
    "pv_step": pv_step,
    "gpu_interpreter": gpu_interpreter,
    "kernels_aot": kernels_aot,
    "cpu_kernels": cpu_kernels,
    "cpu_decode": cpu_decode,
    "server_conformance": server_conformance,
    "server_load": server_load,
    "server_load:throughput": server_throughput,
    "engine_batching": server_throughput,
}


def render(text: str) -> str:
    """A page's text with every table between its markers renewed from its result file."""
    for name, table in TABLES.items():
        file = RESULTS / f"{name.partition(':')[0]}.json"
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        if file.is_file() and begin in text:
            body = table(json.loads(file.read_text(encoding="utf-8")))
            before, _, rest = text.partition(begin)
            _, _, after = rest.partition(end)
            text = f"{before}{begin}{body}\n{end}{after}"
    return text


def renew() -> None:
    """Write the pages with the tables of the stored results."""
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    """Renew the pages, or check them."""
    if "--check" not in sys.argv[1:]:
        renew()
        return
    stale = [page.name for page in PAGES if render(text := page.read_text("utf-8")) != text]
    sys.exit(f"stale: {', '.join(stale)}; python benchmarks/tables.py" if stale else 0)


if __name__ == "__main__":
    main()
