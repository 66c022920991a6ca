"""Learning curves of PV-Tuning's strategies on a real small model, over seeds.

    .venv/bin/python benchmarks/learning_curves.py [MODEL] [SCHEME]

Draws what benchmarks/pv_strategies.py measured: held-out KL to the original model over steps, the
median of the seeds as a line and their range as a band (arXiv 2405.14852 compares subspace PV with
straight-through estimation this way). Writes results/paper_learning_curves.png.
"""

import statistics
import sys
from typing import Any

import matplotlib.pyplot as plt
import results


def curves(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per strategy: steps that all seeds have, the median, lowest and highest KL at each."""
    found: dict[str, Any] = {}
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        runs = [row["curves"] for row in rows if row["strategy"] == strategy]
        points = list(zip(*[[look["held_out_kl"] for look in run] for run in runs], strict=False))
        found[strategy] = {
            "seeds": len(runs),
            "steps": [look["step"] for look in runs[0][: len(points)]],
            "median": [statistics.median(point) for point in points],
            "lowest": [min(point) for point in points],
            "highest": [max(point) for point in points],
        }
    return found


def main() -> None:
    """Read the strategy table, write the plot."""
    model, scheme = [*sys.argv[1:], *("stories260k", "2x4g4")[len(sys.argv) - 1 :]]
    chosen = [
        row
        for row in results.load("pv_strategies")
        if (row["model"], row["representation"]) == (model, scheme) and "curves" in row
    ]
    if not chosen:
        sys.exit(f"the strategy table has no runs of {model} in {scheme}")
    found = curves(chosen)
    figure, axis = plt.subplots(figsize=(6, 4))
    for strategy, curve in found.items():
        (line,) = axis.plot(curve["steps"], curve["median"], label=strategy)
        axis.fill_between(
            curve["steps"], curve["lowest"], curve["highest"], alpha=0.2, color=line.get_color()
        )
    axis.set(yscale="log", xlabel="step", ylabel="held-out KL to the original model, nats")
    axis.set_title(f"{model}, {scheme}, {max(c['seeds'] for c in found.values())} seeds")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(results.FOLDER / "paper_learning_curves.png", dpi=110)


if __name__ == "__main__":
    main()
