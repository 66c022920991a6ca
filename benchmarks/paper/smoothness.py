"""How smooth is a language model's loss along subspaces of its quantised weights?

    .venv/bin/python benchmarks/paper/smoothness.py [MODEL]

A linearised V step may be as long as 1/L. Restricted to a subspace S of groups the loss is smoother
(L_S <= L), so its step is longer and codes really move: the reason for subspace updates
(arXiv 2405.14852, section 3.2). L_S is estimated two ways for shares of the groups from 2 to 100 %,
those with the largest gradients first: along the gradient itself, and as the largest of several
random directions. Both are |grad(w + r d) - grad(w)| / r restricted to S, |d| = 1, with r a
thousandth of the weights' norm. Writes results/paper_smoothness.json and .png.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import machine

from pvrt_tune.data.source_model import load_source
from pvrt_tune.data.text import Windows, from_text
from pvrt_tune.model_blocks import find_blocks, linears

DATA = machine.ROOT.parent / "shared" / "data"
RESULTS = machine.ROOT / "benchmarks" / "results"
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
GROUP, RADIUS, RANDOM = 4, 1e-3, 4


class Loss:
    """Mean next-token loss of a model as a function of one flat vector of its linear weights."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.model, self.tokens = model.requires_grad_(False), tokens
        self.weights = [linear.weight for _, linear in linears(find_blocks(model).blocks)]
        for weight in self.weights:
            weight.requires_grad_(True)
        self.start = torch.cat([w.detach().flatten() for w in self.weights]).clone()

    def gradient(self, vector: Tensor) -> Tensor:
        """Gradient at a vector [all weights]."""
        with torch.no_grad():
            offset = 0
            for weight in self.weights:
                weight.copy_(vector[offset : offset + weight.numel()].view_as(weight))
                offset += weight.numel()
        logits = self.model(self.tokens, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), self.tokens[:, 1:].flatten())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.weights)])


def estimates(loss: Loss, seed: int) -> list[dict[str, float]]:
    """Both estimates for every share."""
    generator = torch.Generator().manual_seed(seed)
    gradient = loss.gradient(loss.start)
    radius = RADIUS * float(loss.start.norm())
    order = gradient.view(-1, GROUP).square().sum(1).argsort(descending=True)

    def rise(direction: Tensor, inside: Tensor) -> float:
        direction = direction * inside
        direction = direction / direction.norm()
        change = loss.gradient(loss.start + radius * direction) - gradient
        return float((change * inside).norm()) / radius

    rows = []
    for share in SHARES:
        groups = torch.zeros(len(order), 1)
        groups[order[: max(1, int(share * len(order)))]] = 1
        inside = groups.expand(-1, GROUP).reshape(-1)
        draws = (torch.randn(len(inside), generator=generator) for _ in range(RANDOM))
        rows.append(
            {
                "share": share,
                "along_gradient": rise(gradient, inside),
                "largest_random": max(rise(draw, inside) for draw in draws),
            }
        )
    return rows


def main() -> None:
    """Estimate, store and draw."""
    model = sys.argv[1] if len(sys.argv) > 1 else str(DATA / "models" / "stories260K-hf")
    source = load_source(model)
    text = str(DATA / "text" / "tinystories.txt")
    if not Path(text).is_file():
        sys.exit(f"{text} is missing: this benchmark needs its text")
    tokens = from_text(text, source.tokenizer, Windows(16, 128, seed=0)).tokens
    rows = estimates(Loss(source.dense(torch.float32), tokens), 0)
    for row in rows:
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    body = {"model": Path(model).name, "group": GROUP, **machine.describe(), "rows": rows}
    (RESULTS / "paper_smoothness.json").write_text(json.dumps(body, indent=1) + "\n")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.5))
    for key in ("along_gradient", "largest_random"):
        axis.plot([row["share"] for row in rows], [row[key] for row in rows], "o-", label=key)
    axis.set(xscale="log", yscale="log", xlabel="share of groups in S", ylabel="estimate of L_S")
    axis.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "paper_smoothness.png", dpi=110)


if __name__ == "__main__":
    main()
