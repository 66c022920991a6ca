"""Write the tables of README.md and of pages in docs/ from benchmarks/results/*.json.

    python benchmarks/tables.py

With --check nothing is written and the exit code says whether they are up to date.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import correlation, median
from typing import Any

import architecture_tables
import gpu_tables
import reliability_tables
import server_tables
import tuning_tables
import vllm_tables
from markdown_table import Row, distinct, formatted, table, where

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RESULTS = ROOT / "benchmarks" / "results"


def short(layer: str) -> str:
    """A layer's name without what all have."""
    return layer.removeprefix("model.layers.")


def first_run(result: Row) -> str:
    """The table of the first real run; what was not measured yet has no line."""
    reference = "Python language reference, perplexity @ 512, original and tuned"
    rows = {
        "python_reference": f"{reference} | {{0[original]:.2f}}, {{0[tuned]:.2f}}",
        "file_bytes": "bytes of the file (269 MB in 16 bits) | {:,}",
        "wikitext2_ppl_original": "WikiText-2 test perplexity @ 2048, original | {:.2f}",
        "wikitext2_ppl_2bit": "WikiText-2 test perplexity @ 2048, tuned | {:.2f}",
        "bits_per_weight_linears": "bits per weight, quantised linears | {:.3f}",
        "bits_per_weight_file": "bits per weight, whole file | {:.3f}",
        "tokens_per_second": "tokens per second, embedded engine | {:.1f}",
        "quickstart_seconds": "`make quickstart`, packages installed | {:.0f} s",
        "test_seconds": "`make test`, packages installed | {:.0f} s",
        "tests_passed": "tests passed | {}",
    }
    head = (f"SmolLM2-135M-Instruct, {result['scheme']}, {result['machine']}", "")
    return table(head, (row.format(result[key]) for key, row in rows.items() if key in result))


def calibration_layers(rows: list[Row]) -> str:
    """One line per layer: the reference, then every effort, as error and CPU seconds."""
    rows = where(rows, part="efforts")
    lines = []
    for layer in distinct(rows, "layer"):
        own = where(rows, layer=layer)
        reference = [own[0][f"reference_{key}"] for key in ("relative_error", "cpu_seconds")]
        pairs = [reference, *((row["relative_error"], row["cpu_seconds"]) for row in own)]
        lines.append([short(layer), *(f"{error:.4f}, {seconds:.1f} s" for error, seconds in pairs)])
    head = (f"SmolLM2-135M, {rows[0]['scheme']}", "reference", *distinct(rows, "effort"))
    return table(head, lines)


def grids(rows: list[Row]) -> str:
    """One line per grid: error of every layer, and its ratio to plain GPTQ's."""
    rows = where(rows, part="grids")
    layers = distinct(rows, "layer")

    def cell(scheme: str, layer: str) -> str:
        for row in where(rows, scheme=scheme, layer=layer):
            return f"{row['relative_error']:.4f}, {row['ratio_to_gptq']:.2f} of GPTQ"
        return "does not divide"

    lines = ([scheme, *(cell(scheme, n) for n in layers)] for scheme in distinct(rows, "scheme"))
    return table(("SmolLM2-135M", *map(short, layers)), lines)


def calibration_ablation(rows: list[Row]) -> str:
    """What each part of calibration is worth over the whole model."""
    original, *measured = sorted(rows, key=lambda row: row["variant"] != "original")
    name = f"SmolLM2-135M, {measured[0]['scheme']}, effort {measured[0]['effort']}"
    first = "original model | {perplexity:.2f} |  | ".format(**original)
    form = "{variant} | {perplexity:.2f} | {mean_layer_error:.4f} | {cpu_seconds:.0f}"
    lines = [first, *(form.format(**row) for row in measured)]
    return table((name, "perplexity", "mean layer error", "CPU seconds"), lines)


def pv_strategies(rows: list[Row]) -> str:
    """What each strategy reaches from the same calibrated model: medians over seeds."""
    names = {"tinystories_ppl": "TinyStories", "wikitext2_ppl": "WikiText-2", "second_ppl": "C4"}

    def perplexities(group: list[Row]) -> dict[str, float]:
        return {text: median(row[text] for row in group) for text in names if text in group[0]}

    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        name = row["strategy"] + (", an hour's run" if row.get("run") == "hour" else "")
        groups.setdefault((row["model"], row["representation"], name), []).append(row)
    # All of a scheme together, in one order of strategies, however the rows came in.
    schemes = list(dict.fromkeys(key[:2] for key in groups))
    strategies = list(dict.fromkeys(key[2] for key in groups))
    order = {key: (schemes.index(key[:2]), strategies.index(key[2])) for key in groups}
    lines: list[list[str]] = []
    for model, scheme, strategy in sorted(groups, key=order.__getitem__):
        group = groups[model, scheme, strategy]
        reached = perplexities(group)
        said = ", ".join(f"{names[text]} {value:.2f}" for text, value in reached.items())
        line = [f"{model}, {scheme}", strategy]
        if "heldout_kl" not in group[0]:
            lines.append([*line, "", "", said, "", ""])
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
        spent = f"{median(row['cpu_seconds'] for row in group):.0f}"
        line += [f"{steps} x {tokens}", f"{median(kls):.4f}{seeds}", said, closed, spent]
        lines.append(line)
    head = "held-out KL (range of the seeds)", "perplexity"
    closed = "share of the gap in log perplexity closed"
    return table(
        ("model, scheme", "strategy", "steps x tokens", *head, closed, "CPU seconds"), lines
    )


def pv_step(rows: list[Row]) -> str:
    """Time of one tuning step and the share of its V step."""
    return formatted(
        "model, scheme | threads | tokens a step | seconds | tokens/s | share of the V step",
        "{model}, {scheme} | {threads} | {tokens_per_step} | {seconds:.1f} | "
        "{tokens_per_second:.0f} | {v_share:.1%}",
        rows,
    )


def cpu_kernels(rows: list[Row]) -> str:
    """Microseconds of one product per kernel and shape, and the largest error; by threads."""
    shapes, counts = distinct(rows, "shape"), sorted(distinct(rows, "threads"))
    lines = []
    for kernel in distinct(rows, "kernel"):
        own = where(rows, kernel=kernel)
        cells = []
        for shape in shapes:
            times = {r["threads"]: f"{r['microseconds']:.0f}" for r in where(own, shape=shape)}
            cells.append(" / ".join(times.get(n, "-") for n in counts) if times else "")
        errors = [[row["relative_error"] for row in where(own, threads=n)] for n in counts]
        worst = " / ".join(f"{max(found):.1e}" if found else "-" for found in errors)
        lines.append([kernel, *cells, worst])
    threads = " / ".join(map(str, counts))
    return table((f"us, {threads} threads of {rows[0]['machine']}", *shapes, "error"), lines)


def cpu_head(rows: list[Row]) -> str:
    """Microseconds of the last product of a token, per head; by instruction set and shape."""
    sets, shapes = distinct(rows, "instruction_set"), distinct(rows, "shape")
    lines = []
    for head in distinct(rows, "head"):
        own = where(rows, head=head, threads=1)
        by_case = {(r["instruction_set"], r["shape"]): str(r["microseconds"]) for r in own}
        lines.append([head, *(by_case.get((i, shape), "") for i in sets for shape in shapes)])
    columns = (f"{name}, {shape}" for name in sets for shape in shapes)
    return table((f"us, 1 thread of {rows[0]['machine']}", *columns), lines)


def kernels_aot(rows: list[Row]) -> str:
    """The most that any binary of a kernel takes on an architecture, by the newest Triton."""
    newest = max(distinct(rows, "triton"), key=lambda v: tuple(map(int, v.split("."))))
    archs = sorted(distinct(rows, "arch"), key=lambda arch: int(arch[3:]))

    def cell(kernel: str, arch: str) -> str:
        for row in where(rows, triton=newest, kernel=kernel, arch=arch):
            return f"{row['registers']}, {row['shared_bytes'] / 1024:.0f}"
        return ""

    title = (
        f"{sum(row['binaries'] for row in rows)} binaries, "
        f"Triton {' and '.join(sorted(distinct(rows, 'triton')))}, "
        f"spills {max(row['spill_bytes'] for row in rows)} bytes; registers, KiB shared of {newest}"
    )
    kernels = sorted(distinct(where(rows, triton=newest), "kernel"))
    return table(
        (title, *archs), ([f"`{name}`", *(cell(name, arch) for arch in archs)] for name in kernels)
    )


def calibration_shapes(rows: list[Row]) -> str:
    """One line per layer."""
    return formatted(
        "layer | scheme | relative error | CPU seconds",
        "{shape[0]} x {shape[1]} | {scheme} | {relative_error:.4f} | {cpu_seconds:.0f}",
        rows,
    )


def allocation(rows: list[Row]) -> str:
    """True KL of layers in codes at equal bytes, by how their bits were shared out."""
    rows = where(rows, part="allocation")
    return formatted("bits shared out by | bytes | KL", "{method} | {bytes} | {kl:.3f}", rows)


def sensitivity(rows: list[Row]) -> str:
    """How well each estimate ranks layers by the true KL of 2 bits in them alone."""
    rows = where(rows, part="tensor")
    estimates = {
        "kl_same_text": "the layer itself in codes, on the text that is measured on",
        "kl_shaped_noise": "KL with shaped noise (what `--bits` does)",
        "kl_plain_noise": "KL with plain noise",
        "relative_error": "the relative error of the fit",
    }
    true = _ranks(row["kl"] for row in rows)
    lines = (
        (says, f"{correlation(true, _ranks(row[name] for row in rows)):.2f}")
        for name, says in estimates.items()
    )
    return table(
        (f"estimate, {len(rows)} layers", "rank correlation with the KL of other text"), lines
    )


def _ranks(values: Iterable[float]) -> list[int]:
    found = list(values)
    return [sorted(found).index(value) for value in found]


def cpu_decode(rows: list[Row]) -> str:
    """One line per model, engine, format and number of threads."""
    return formatted(
        f"{rows[0]['machine']} | format | bits | CPU has | threads | tokens/s | prompt tokens/s | "
        "share of bandwidth",
        "{model}, {engine} | {format} | {bits:.2f} | {isa} | {threads} | "
        "{decode_tokens_per_s:.1f} | {prompt_tokens_per_s:.0f} | {bandwidth_fraction:.2f}",
        sorted(rows, key=lambda row: (row["model"], row["isa"], row["threads"])),
    )


def pareto(rows: list[Row]) -> str:
    """A table per model, one line per file, by size."""
    models = distinct(rows, "model")
    return "\n\n".join(_files(name, where(rows, model=name)) for name in models)


def _files(model: str, rows: list[Row]) -> str:
    """Of one model; marked where no file is at most as large and nearer."""

    def front(row: Row) -> bool:
        rivals = (other for other in rows if other is not row)
        return not any(o["bytes"] <= row["bytes"] and o["kl"] <= row["kl"] for o in rivals)

    def cell(form: str, value: float | None) -> str:
        return "" if value is None else form.format(value)

    lines = []
    for row in sorted(rows, key=lambda row: row["bytes"]):
        tasks = [score for score in row["zero_shot"].values() if score is not None]
        lines.append(
            [
                f"{row['tool']} {row['method']}",
                f"**{row['bytes'] / 1e6:.1f}**" if front(row) else f"{row['bytes'] / 1e6:.1f}",
                f"{row['bits_file']:.2f}",
                f"{row['wikitext2_ppl']:.2f}",
                f"{math.log(row['wikitext2_ppl'] / row['original_ppl']):.3f}",
                f"{row['kl']:.4f}",
                cell("{:.2f}", row["c4_ppl"]),
                cell("{:.4f}", row["c4_kl"]),
                cell("{:.1%}", row["greedy_equal"]),
                f"{sum(tasks) / len(tasks):.1%}" if len(tasks) == len(row["zero_shot"]) else "",
                f"{row['cpu_seconds']:.0f}",
                cell("{:.0f}", row["decode_tokens_per_s"]),
            ]
        )
    head = (model, "MB", "bits over the file", "WikiText-2", "log gap", "KL")
    rest = ("C4", "KL on C4", "greedy", "zero-shot", "CPU seconds", "tokens/s")
    return table((*head, *rest), lines)


#: Tables by the name between their markers; before a colon it is the result file's.
TABLES: dict[str, Callable[[Any], str]] = {
    "first_run": first_run,
    "calibration_layers": calibration_layers,
    "calibration_layers:grids": grids,
    "calibration_ablation": calibration_ablation,
    "calibration_shapes": calibration_shapes,
    "allocation": allocation,
    "allocation:sensitivity": sensitivity,
    "pareto": pareto,
    "architectures": architecture_tables.architectures,
    "plan": tuning_tables.plan,
    "quality": tuning_tables.quality,
    "fits": tuning_tables.fits,
    "fits:least": tuning_tables.least_machines,
    "pv_strategies": pv_strategies,
    "pv_step": pv_step,
    "kernels_aot": kernels_aot,
    "cpu_kernels": cpu_kernels,
    "cpu_decode": cpu_decode,
    "cpu_head": cpu_head,
    "server_conformance": server_tables.conformance,
    "server_load": server_tables.load,
    "server_load:beside": server_tables.beside,
    "server_load:throughput": server_tables.throughput,
    "gpu_nvidia_h100_80gb_hbm3:products": gpu_tables.products,
    "gpu_nvidia_h100_80gb_hbm3:steps": gpu_tables.steps,
    "gpu_nvidia_h100_80gb_hbm3:batches": gpu_tables.batches,
    "vllm_matrix:layouts": vllm_tables.layouts,
    "vllm_matrix:versions": vllm_tables.versions,
    "vllm_features": vllm_tables.features,
    "vllm_load": vllm_tables.load,
    "vllm_bench": vllm_tables.bench,
    "vllm_experts": vllm_tables.experts,
    "reliability:mutants": reliability_tables.mutants,
    "reliability:abuse": reliability_tables.abuse,
    "reliability:rest": reliability_tables.rest,
}


def render(text: str) -> str:
    """A page's text with every table between its markers renewed from its result file."""
    for name, make in TABLES.items():
        file = RESULTS / f"{name.partition(':')[0]}.json"
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        if file.is_file() and begin in text:
            body = make(json.loads(file.read_text(encoding="utf-8")))
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
