"""Block tuning: P and V steps on the error of a block's outputs.

Codes move too, as in PV-Tuning of the whole model (arXiv 2405.14852). But a block takes hundreds of
steps in the time of a few steps of the model, and its loss has a target for every token and
channel, so that a gradient says more than one of the logits. AQLM (arXiv 2401.06118, section 3,
phase 3) tunes blocks with fixed codes, which is what `move_codes: false` does.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt_tune.data.activations import Activations
from pvrt_tune.fit.grid import GridLinear
from pvrt_tune.model_blocks import run_block
from pvrt_tune.pv import optimizer
from pvrt_tune.pv.adam import Adam
from pvrt_tune.pv.dense import decoded
from pvrt_tune.pv.optimizer import PVOptimizer
from pvrt_tune.pv.representation import Representation
from pvrt_tune.settings import FinetuneSettings, PVSettings, Recipe
from pvrt_tune.shapes import BlockShape, ModelShape

_BETAS = (0.9, 0.95)
# A token whose target is nothing has no relative error: this share of the mean counts in its place.
_FLOOR = 1e-9


@dataclass(frozen=True)
class FinetuneReport:
    """Error on held-out batches (`BlockLoss`) before and after; moved: how many groups got new
    codes, as a share of all, summed over steps.
    """

    before: float
    after: float
    moved: float


@dataclass(frozen=True)
class Examples:
    """What a block is to do: hidden states before and after it, and its other keyword arguments by
    batch."""

    inputs: Activations
    targets: Activations
    arguments: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class BlockLoss:
    """Half the mean over tokens of their relative squared errors, plus half that of all together.

    A few tokens (the first one above all) have hidden states of a thousand times the power of the
    others. Alone, the plain mean square sees nothing but these; the relative one would give up
    their accuracy, on which the attention of all other tokens depends.
    """

    power: Tensor

    @classmethod
    def of(cls, targets: Iterator[Tensor]) -> "BlockLoss":
        """The loss for targets; their mean square is what errors of all tokens are relative to."""
        powers = [target.square().sum(-1).mean() for target in targets]
        return cls(torch.stack(powers).mean().clamp_min(1e-12))

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Of outputs and targets [batch, length, width] in float32."""
        error, size = (output - target).square().sum(-1), target.square().sum(-1)
        relative = error / size.clamp_min(_FLOOR * self.power)
        return 0.5 * (relative.mean() + error.mean() / self.power)


def finetune_block(
    block: nn.Module,
    examples: Examples,
    settings: FinetuneSettings,
    compute: torch.dtype,
    generator: torch.Generator,
) -> FinetuneReport:
    """Tune a quantised block in place, in float32, with products in `compute` where codes move.

    The state of least error on held-out batches is kept. Where an epoch of moving codes has not
    lowered that error, they stay as they were: in a block that makes the huge hidden state of one
    token, every other code is a large part of the error that is allowed there.
    """
    report = None
    if settings.move_codes and settings.epochs and _in_codes(block):
        report = _tune(_Codes(block, settings, compute), examples, settings, generator)
    if report is None or not report.after < report.before:
        report = _tune(_Floats(block, settings), examples, settings, generator)
    return report


def _tune(
    block: "_Floats | _Codes",
    examples: Examples,
    settings: FinetuneSettings,
    generator: torch.Generator,
) -> FinetuneReport:
    inputs, targets, arguments = examples.inputs, examples.targets, examples.arguments
    count = max(1, round(settings.held_out * len(inputs)))
    train = list(range(len(inputs) - count)) or [0]
    held_out = list(range(len(inputs) - count, len(inputs)))
    loss = BlockLoss.of(targets[i] for i in held_out)
    steps = settings.epochs * len(train)
    step, moved = 0, 0.0

    def held_out_error() -> float:
        with torch.no_grad():
            losses = [loss(block.run(inputs[i], arguments[i]), targets[i]) for i in held_out]
        return float(torch.stack(losses).mean())

    first = best = held_out_error()
    best_state = [tensor.clone() for tensor in block.state()]
    for _ in range(settings.epochs):
        for i in torch.randperm(len(train), generator=generator).tolist():
            output = block.run(inputs[train[i]], arguments[train[i]])
            torch.autograd.backward(loss(output, targets[train[i]]))
            moved += block.step(0.5 * (1 + math.cos(math.pi * step / steps)), generator)
            step += 1
        error = held_out_error()
        if not error < best:
            break
        best = error
        best_state = [tensor.clone() for tensor in block.state()]
    for tensor, value in zip(block.state(), best_state, strict=True):
        tensor.copy_(value)
    block.finish()
    return FinetuneReport(first, best, moved)


def _in_codes(block: nn.Module) -> dict[str, AQLMLinear | GridLinear]:
    """The quantised layers of a block, by name; other layers may have stayed dense."""
    return {n: m for n, m in block.named_modules() if isinstance(m, AQLMLinear | GridLinear)}


class _Floats:
    """Codebooks, scales, norms and biases of a block in training; codes stay."""

    def __init__(self, block: nn.Module, settings: FinetuneSettings) -> None:
        self._block = block
        self._trained = [p for p in block.parameters() if p.is_floating_point()]
        for parameter in self._trained:
            parameter.requires_grad_(True)
        sizes = torch.stack([p.detach().square().mean().sqrt() for p in self._trained]).tolist()
        self._adam = Adam(self._trained, [settings.learning_rate * s for s in sizes], _BETAS)

    def run(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The block's outputs in float32."""
        return run_block(self._block, hidden, arguments)

    def step(self, factor: float, generator: torch.Generator) -> float:
        """Move by the gradients; how many groups got new codes, as a share of all."""
        self._adam.step(factor)
        return 0.0

    def state(self) -> list[Tensor]:
        """All that is trained."""
        return [parameter.detach() for parameter in self._trained]

    def finish(self) -> None:
        """Leave the block as it now is, quantised and without gradients."""
        for parameter in self._trained:
            parameter.requires_grad_(False)


class _Codes:
    """The same, and codes move: meanwhile the block's layers are dense, with decoded weights."""

    def __init__(self, block: nn.Module, settings: FinetuneSettings, compute: torch.dtype) -> None:
        self._block, self._compute = block, compute
        self._layers = _in_codes(block)
        self._representations: dict[str, Representation] = {}
        weights: dict[str, nn.Parameter] = {}
        for name, layer in self._layers.items():
            dense, self._representations[name] = decoded(layer, compute)
            block.set_submodule(name, dense)
            weights[name] = block.get_parameter(f"{name}.weight")
        self._weights = list(weights.values())
        inside = {id(weight) for weight in self._weights}
        self._floats = {
            name: parameter
            for name, parameter in block.named_parameters()
            if id(parameter) not in inside and parameter.is_floating_point()
        }
        self._trained = [p for p in block.parameters() if p.is_floating_point()]
        for parameter in self._trained:
            parameter.requires_grad_(True)
        given = self._representations, weights, self._floats
        self._optimizer = PVOptimizer(*given, steps_of(settings))

    def run(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The block's outputs in float32."""
        return run_block(self._block, hidden, arguments, self._compute)

    def step(self, factor: float, generator: torch.Generator) -> float:
        """Move by the gradients; how many groups got new codes, as a share of all."""
        for weight in self._weights:
            if weight.grad is None:  # no token came to this expert, or it only makes choices
                weight.grad = torch.zeros_like(weight)
        return self._optimizer.step(factor, generator).changed

    def state(self) -> list[Tensor]:
        """All that is trained."""
        parts = [r.tensors().values() for r in self._representations.values()]
        floats = [parameter.detach() for parameter in self._floats.values()]
        return [tensor.detach() for part in parts for tensor in part] + floats

    def finish(self) -> None:
        """Leave the block as it now is, quantised and without gradients."""
        for parameter in self._trained:
            parameter.requires_grad_(False)
        for name, layer in self._layers.items():
            self._block.set_submodule(name, layer.requires_grad_(False))
            for part, tensor in self._representations[name].tensors().items():
                layer.get_parameter(part).data = tensor.detach()


def steps_of(settings: FinetuneSettings) -> PVSettings:
    """Settings of P and V steps on a block."""
    return PVSettings(
        learning_rate=settings.learning_rate,
        code_learning_rate=settings.code_learning_rate,
        low_memory=False,
    )


def peak_bytes(model: ModelShape, recipe: Recipe, tokens: int, itemsize: int, device: str) -> int:
    """Peak of `finetune_block` for the largest block on "cpu" or a GPU, with batches of `tokens`
    tokens, and products in `itemsize` bytes a number where codes move.
    """
    settings = recipe.settled.finetune
    return max(
        _codes_bytes(replace(model, blocks=(block,), ends=()), recipe, tokens, itemsize, device)
        if settings.move_codes
        else _floats_bytes(block, tokens, device)
        for block in set(model.blocks)
    )


def _codes_bytes(model: ModelShape, recipe: Recipe, tokens: int, itemsize: int, device: str) -> int:
    """Peak for a model of one block whose codes move."""
    (block,) = model.blocks
    steps = replace(recipe, pv=steps_of(recipe.finetune))
    # The quantised block and the best state; what is trained, its moments and gradients.
    kept = 2 * (block.codes + 4 * block.floats) + 4 * block.floats
    kept += optimizer.state_bytes(model, block.floats) + optimizer.latent_bytes(model, steps.pv)
    # Decoded weights with gradients.
    kept += 2 * itemsize * block.weights
    # Adam divides all at once on a GPU, and gradients of large codebooks need as much.
    divided = 4 * block.floats + 3 * 4 * block.largest
    step = max(optimizer.step_bytes(model, steps, device), divided)
    return int(kept + max(4 * tokens * block.kept, step))


def _floats_bytes(shape: BlockShape, tokens: int, device: str) -> int:
    """Peak for a block whose codes stay."""
    # Codes; floating numbers, two moments, and the best state.
    block = shape.codes + 4 * 4 * shape.floats
    # Autograd keeps weights on grids, and the steps that they are made of. Of one layer: decoded
    # weight, its gradient, and what the gradients of codebooks take: in C they are summed up apart.
    layer = 3 * shape.largest + 2 * shape.floats // len(shape.linears)
    weights = 2 * 4 * shape.on_grids + 4 * (layer if device == "cpu" else 6 * shape.largest)
    # Gradients come meanwhile. Between passes there are these, and what Adam divides by or a new
    # best state.
    return int(block + 4 * shape.floats + max(weights + 4 * tokens * shape.kept, 4 * shape.floats))
