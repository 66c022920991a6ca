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
    rows = [row for row in where(results.load("pareto"), model=model) if row["tool"] != "original"]
    if not rows:
        sys.exit(f"the Pareto table has no files of {model}")
    figure, axis = plt.subplots(figsize=(8, 5))
    for tool in distinct(rows, "tool"):
        own = sorted(where(rows, tool=tool), key=lambda row: row["bytes"])
        points = [(row["bytes"] / 1e6, row["kl"]) for row in own]
        (line,) = axis.plot(*zip(*points, strict=True), marker="o", label=tool)
        for point, row in zip(points, own, strict=True):
            place: dict[str, Any] = {"xytext": (4, 4), "textcoords": "offset points"}
            place |= {"color": line.get_color(), "fontsize": 7}
            axis.annotate(row["method"], point, **place)
    axis.axhline(rows[0]["kl_noise_floor"], color="grey", linestyle=":", label="noise floor")
    sizes = [row["bytes"] / 1e6 for row in rows]
    least, most = min(sizes) / 1.2, max(sizes) * 1.2
    axis.set(xscale="log", yscale="log", xlim=(least, most))
    ticks = [tick for tick in (40, 50, 60, 80, 100, 150, 200) if least < tick < most]
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.set_xticks([], minor=True)
    axis.set_xlabel("whole file, MB")
    axis.set_ylabel("KL to the original on WikiText-2, nats a token")
    axis.set_title(f"{model}: quality against bytes")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(results.FOLDER / "pareto.png", dpi=110)


if __name__ == "__main__":
    main()
