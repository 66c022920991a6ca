"""PV-Tuning's algorithm where everything can be exact: a quadratic in six dimensions.

    .venv/bin/python benchmarks/paper/quadratic.py

phi(x) = 1/2 (x - m)^T A (x - m), at most c distinct values among the coordinates of x, c = 1..6, 50
random starts (arXiv 2405.14852, the small-scale figures). Compared: the exact alternation of P and
V steps; the linearised V step (round y - grad/L) with T inner iterations; the sparse linearised V
step that moves k coordinates with the smaller constant L_S, chosen greedily by gradient, with
chance proportional to it, or uniformly. Writes results/paper_quadratic.json and .png.
"""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import machine

Array = NDArray[Any]
DIMENSIONS, STARTS, STEPS, SUBSPACE = 6, 50, 60, 2
RESULTS = machine.ROOT / "benchmarks" / "results"


class Quadratic:
    """phi, its gradient and smoothness, and the exact P step."""

    def __init__(self, generator: np.random.Generator) -> None:
        basis, _ = np.linalg.qr(generator.normal(size=(DIMENSIONS, DIMENSIONS)))
        self.matrix = basis @ np.diag(np.geomspace(1, 30, DIMENSIONS)) @ basis.T
        self.minimum = generator.normal(size=DIMENSIONS)

    def value(self, x: Array) -> float:
        """phi(x)."""
        return float(0.5 * (x - self.minimum) @ self.matrix @ (x - self.minimum))

    def gradient(self, x: Array) -> Array:
        """Gradient of phi."""
        slope: Array = self.matrix @ (x - self.minimum)
        return slope

    def smoothness(self, subset: Array) -> float:
        """L of phi restricted to coordinates."""
        return float(np.linalg.eigvalsh(self.matrix[np.ix_(subset, subset)])[-1])

    def p_step(self, codes: Array, count: int) -> Array:
        """The best values for a partition; values that nobody uses are kept at zero weight."""
        members = np.eye(count)[codes]
        system = members.T @ self.matrix @ members
        values: Array = np.linalg.lstsq(system, members.T @ self.matrix @ self.minimum, rcond=None)[
            0
        ]
        return values


def exact_v(
    problem: Quadratic, values: Array, codes: Array, generator: np.random.Generator
) -> Array:
    """The best of all c^6 assignments."""
    every = np.array(list(itertools.product(range(len(values)), repeat=DIMENSIONS)))
    points = values[every] - problem.minimum
    best: Array = every[np.argmin(np.einsum("ni,ij,nj->n", points, problem.matrix, points))]
    return best


def nearest(values: Array, targets: Array) -> Array:
    """Number of the nearest value for each target."""
    numbers: Array = np.abs(targets[:, None] - values).argmin(1)
    return numbers


def linearised_v(inner: int) -> Callable[..., Array]:
    """Round y - grad / L, `inner` times."""

    def step(
        problem: Quadratic, values: Array, codes: Array, generator: np.random.Generator
    ) -> Array:
        everything = np.arange(DIMENSIONS)
        for _ in range(inner):
            x = values[codes]
            codes = nearest(values, x - problem.gradient(x) / problem.smoothness(everything))
        return codes

    return step


def sparse_v(choice: str, inner: int) -> Callable[..., Array]:
    """Round y - grad / L_S on a subspace S of few coordinates, `inner` times."""

    def step(
        problem: Quadratic, values: Array, codes: Array, generator: np.random.Generator
    ) -> Array:
        for _ in range(inner):
            x = values[codes]
            gradient = problem.gradient(x)
            size = np.abs(gradient) + 1e-12
            if choice == "greedy":
                subset = np.argsort(-size)[:SUBSPACE]
            else:
                chance = size / size.sum() if choice == "proportional" else None
                subset = generator.choice(DIMENSIONS, SUBSPACE, replace=False, p=chance)
            target = x[subset] - gradient[subset] / problem.smoothness(subset)
            codes = codes.copy()
            codes[subset] = nearest(values, target)
        return codes

    return step


METHODS: dict[str, Callable[..., Array]] = {
    "exact": exact_v,
    "linearised, T=1": linearised_v(1),
    "linearised, T=8": linearised_v(8),
    "sparse greedy, T=8": sparse_v("greedy", 8),
    "sparse proportional, T=8": sparse_v("proportional", 8),
    "sparse uniform, T=8": sparse_v("uniform", 8),
}


def run(method: Callable[..., Array], count: int, seed: int) -> list[float]:
    """phi after every P and every V step from one random start."""
    problem = Quadratic(np.random.default_rng(0))
    generator = np.random.default_rng([seed, count])
    # A start with exactly c values, as in the paper: a V step cannot bring back one that none uses.
    rest = generator.integers(count, size=DIMENSIONS - count)
    codes = generator.permutation(np.concatenate([np.arange(count), rest]))
    curve = []
    for _ in range(STEPS):
        values = problem.p_step(codes, count)
        curve.append(problem.value(values[codes]))
        before, codes = codes, method(problem, values, codes, generator)
        curve.append(problem.value(values[codes]))
        if method is exact_v and (codes == before).all():  # it would stay here for ever
            curve += [curve[-1]] * (2 * STEPS - len(curve))
            break
    return curve


def main() -> None:
    """Run everything, store the medians over starts and draw them."""
    rows = []
    for name, method in METHODS.items():
        for count in range(1, DIMENSIONS + 1):
            curves = np.array([run(method, count, seed) for seed in range(STARTS)])
            scale = np.abs(curves).max()
            rises = float((np.diff(curves, axis=1) > 1e-9 * scale).mean())
            rows.append(
                {
                    "method": name,
                    "values": count,
                    "starts": STARTS,
                    "share_of_steps_that_rise": rises,
                    "final_median": float(np.median(curves[:, -1])),
                    "final_mean": float(curves[:, -1].mean()),
                    "curve_mean": curves.mean(0)[: 2 * 20].round(6).tolist(),
                }
            )
            print(f"{name:26} c={count}  final {rows[-1]['final_mean']:.4f}  rises {rises:.3f}")
    body = {**machine.describe(), "rows": rows}
    (RESULTS / "paper_quadratic.json").write_text(json.dumps(body, indent=1) + "\n")
    draw(rows)


def draw(rows: list[dict[str, object]]) -> None:
    """One panel per number of values: mean phi by step."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True)
    for count, axis in enumerate(axes.flat, 1):
        for row in rows:
            if row["values"] == count:
                axis.plot(row["curve_mean"], label=row["method"])
        axis.set_title(f"{count} distinct values")
        axis.set_yscale("symlog", linthresh=1e-3)
    axes[1][1].set_xlabel("P and V steps")
    axes[0][0].set_ylabel("mean of phi over starts")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "paper_quadratic.png", dpi=110)


if __name__ == "__main__":
    main()
