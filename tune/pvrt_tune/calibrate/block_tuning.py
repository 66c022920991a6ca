"""Block fine-tuning: codebooks, scales, norms and biases against the dense block's outputs.

Codes stay fixed (arXiv 2401.06118, section 3, phase 3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pvrt_tune.data.activations import Activations
from pvrt_tune.model_blocks import run_block
from pvrt_tune.pv.adam import Adam
from pvrt_tune.settings import FinetuneSettings
from pvrt_tune.shapes import BlockShape


@dataclass(frozen=True)
class FinetuneReport:
    """Held-out mean squared error over the target's mean square, before and after."""

    before: float
    after: float


@dataclass(frozen=True)
class Examples:
    """What a block is to do: hidden states before and after it, and its other keyword arguments by
    batch."""

    inputs: Activations
    targets: Activations
    arguments: Sequence[dict[str, Any]]


def finetune_block(
    block: nn.Module, examples: Examples, settings: FinetuneSettings, generator: torch.Generator
) -> FinetuneReport:
    """Train a block's floating parameters in place; the best state on held-out batches is kept."""
    inputs, targets, arguments = examples.inputs, examples.targets, examples.arguments
    count = max(1, round(settings.held_out * len(inputs)))
    train = list(range(len(inputs) - count)) or [0]
    held_out = list(range(len(inputs) - count, len(inputs)))
    parameters = [p for p in block.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    sizes = torch.stack([p.detach().square().mean().sqrt() for p in parameters]).tolist()
    optimizer = Adam(parameters, [settings.learning_rate * size for size in sizes], (0.9, 0.95))
    step, steps = 0, settings.epochs * len(train)

    def loss(batch: int) -> Tensor:
        output = run_block(block, inputs[batch], arguments[batch])
        return (output - targets[batch]).square().mean()

    def held_out_error() -> float:
        with torch.no_grad():
            return sum(float(loss(i)) for i in held_out) / len(held_out)

    power = sum(float(targets[i].square().mean()) for i in held_out) / len(held_out)
    first = best = held_out_error()
    best_state = [p.detach().clone() for p in parameters]
    for _ in range(settings.epochs):
        for i in torch.randperm(len(train), generator=generator).tolist():
            torch.autograd.backward(loss(train[i]) / power)
            optimizer.step(0.5 * (1 + math.cos(math.pi * step / steps)))
            step += 1
        error = held_out_error()
        if not error < best:
            break
        best = error
        best_state = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, best_state, strict=True):
            parameter.copy_(value)
            parameter.requires_grad_(False)
    return FinetuneReport(first / power, best / power)


def peak_bytes(shape: BlockShape, tokens: int) -> int:
    """Peak of `finetune_block` for a quantised block in float32 and batches of `tokens` tokens."""
    # Codes; floating numbers, two moments, and the best state.
    block = shape.codes + 4 * 4 * shape.floats
    # Autograd keeps weights on grids, and the steps that they are made of. Of one layer: decoded
    # weight, its gradient, and what the gradients of codebooks take.
    weights = 2 * 4 * shape.on_grids + 6 * 4 * shape.largest
    # Gradients come meanwhile. Between passes there are these, and what Adam divides by or a new
    # best state.
    return int(block + 4 * shape.floats + max(weights + 4 * tokens * shape.kept, 4 * shape.floats))
