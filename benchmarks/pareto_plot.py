"""Quality against bytes: draws results/pareto.png of what benchmarks/pareto.py measured.

    python benchmarks/pareto_plot.py [MODEL]

One line per tool; both axes logarithmic. The noise floor is what rounding the original's arithmetic
to bfloat16 does.
"""

import sys
from typing import Any

import matplotlib.pyplot as plt
import results
from markdown_table import distinct, where


def main() -> None:
    """Read the rows, write the plot."""
    model = (*sys.argv[1:], "smollm2-135m")[0]
    rows = where(results.load("pareto"), model=model)
    figure, axis = plt.subplots(figsize=(8, 5))
    for tool in distinct(rows, "tool"):
        own = sorted(where(rows, tool=tool), key=lambda row: row["bytes"])
        if tool == "original":
            continue
        sizes = [row["bytes"] / 1e6 for row in own]
        (line,) = axis.plot(sizes, [row["kl"] for row in own], marker="o", label=tool)
        for size, row in zip(sizes, own, strict=True):
            place: dict[str, Any] = {"xytext": (4, 4), "textcoords": "offset points"}
            place |= {"color": line.get_color(), "fontsize": 7}
            axis.annotate(row["method"], (size, row["kl"]), **place)
    axis.axhline(rows[0]["kl_noise_floor"], color="grey", linestyle=":", label="noise floor")
    axis.set_xscale("log")
    axis.set_yscale("log")
    peers = [row["bytes"] / 1e6 for row in rows if row["tool"] != "original"]
    axis.set_xlim(min(peers) / 1.2, max(peers) * 1.2)
    ticks = [40, 50, 60, 80, 100, 150, 200]
    shown = [tick for tick in ticks if min(peers) / 1.2 < tick < max(peers) * 1.2]
    axis.set_xticks(shown, list(map(str, shown)))
    axis.set_xticks([], minor=True)
    axis.set_xlabel("whole file, MB")
    axis.set_ylabel("KL to the original on WikiText-2, nats a token")
    axis.set_title(f"{model}: quality against bytes")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(results.FOLDER / "pareto.png", dpi=110)


if __name__ == "__main__":
    main()
