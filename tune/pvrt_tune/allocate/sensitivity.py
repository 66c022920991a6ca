"""What noise in one unit costs: KL to the original model, on a few windows of calibration text.

The streams of all units of some blocks (a sweep) go through the rest of the model side by side, so
that every block is loaded once per sweep and no more is in memory than calibration has: one stream
of hidden states per unit, as many as calibration's own states have room for. A sweep is a piece of
the run.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvrt.errors import RunError
from pvrt_tune.allocate.errors import fitted, tried
from pvrt_tune.allocate.noise import rows_like, shaped
from pvrt_tune.allocate.units import Unit
from pvrt_tune.data.activations import Activations, in_memory, on_disk
from pvrt_tune.machine import release_memory
from pvrt_tune.model_blocks import (
    batch_size,
    observe,
    record_inputs,
    run_block,
    run_head,
)
from pvrt_tune.progress import Clock
from pvrt_tune.randomness import seeded
from pvrt_tune.run import Run

# Blocks whose units are measured in one sweep, at most: what a kill costs.
_SWEEP_BLOCKS = 4


@dataclass(frozen=True)
class Measured:
    """Of a unit: errors of fits by scheme as text (see `allocate.errors`), and KL in nats per token
    of each window with noise of the reference's error in the unit.
    """

    errors: dict[str, float]
    kl: list[float] = field(default_factory=list)


@dataclass
class _States:
    """Hidden states before the block at hand: of all calibration windows, which give the second
    moments, and of the windows that KL is measured on.
    """

    outer: Any
    wide: Activations
    spare: Activations
    wide_arguments: list[dict[str, Any]]
    tokens: Tensor
    short: Tensor
    short_arguments: list[dict[str, Any]]


def measure(run: Run, units: Sequence[Unit]) -> dict[str, Measured]:
    """Measure all units, by key; what the run's store already has is read from there.

    Raises RunError when no calibration token reached a layer.
    """
    sweeps = _sweeps(run, units)
    pieces = {piece: run.store.report(piece) for piece in sweeps}
    if any(report is None for report in pieces.values()):
        _Measurement(run, units).through(sweeps)
        pieces = {piece: run.store.noted(piece) for piece in sweeps}
    return {
        key: Measured(**values)
        for report in pieces.values()
        for key, values in (report or {})["units"].items()
    }


def _sweeps(run: Run, units: Sequence[Unit]) -> dict[str, range]:
    """Blocks of every sweep, by the name of its piece."""
    recipe, count = run.recipe, len(run.blocks.blocks)
    per_block = -(-len(units) // count)
    room = recipe.samples * recipe.length // _tokens(run).numel()
    size = min(_SWEEP_BLOCKS, max(1, room // per_block))
    return {
        f"sensitivity-{first:05d}": range(first, min(first + size, count))
        for first in range(0, count, size)
    }


def _tokens(run: Run) -> Tensor:
    """The windows that KL is measured on: the beginnings of the first ones that calibrate."""
    settings = run.recipe.allocation
    return run.data[run.recipe.calibration].tokens[: settings.windows, : settings.length]


class _Measurement:
    """The passes through the original model."""

    def __init__(self, run: Run, units: Sequence[Unit]) -> None:
        self.run, self.count = run, len(run.blocks.blocks)
        self.tried = tried(units)
        self.outer = [unit for unit in units if unit.block is None]
        self.inside: dict[int, list[Unit]] = {index: [] for index in range(self.count)}
        for unit in units:
            if unit.block is not None:
                self.inside[unit.block].append(unit)

    def through(self, sweeps: dict[str, range]) -> None:
        """Run all sweeps that the store lacks, in order."""
        states = self._start()
        self.clock = Clock(0)
        for piece, blocks in sweeps.items():
            if self.run.store.report(piece) is None:
                self.clock.total += self._passes(blocks)
        for piece, blocks in sweeps.items():
            if self.run.store.report(piece) is None:
                kl, units = self._sweep(states, blocks)
                report = {"units": {key: asdict(value) for key, value in units.items()}}
                self.run.store.save(piece, {"kl": kl}, report)
            else:
                for index in blocks:
                    self._advance(states, index)
        release_memory()

    def _passes(self, blocks: range) -> int:
        """Times that one stream passes one block in a sweep."""
        own = sum(len(self.inside[index]) * (self.count - index) for index in blocks)
        return own + (len(self.outer) * self.count if blocks.start == 0 else 0)

    def _start(self) -> _States:
        run = self.run
        recipe, source = run.recipe, run.source
        outer = source.partial(source.outside(run.blocks.name), run.device)
        outer.tie_weights()
        for parameter in outer.parameters():
            if not parameter.is_meta:
                # A tensor of the source may be a view of its file, and here noise goes into it.
                parameter.data = parameter.data.to(torch.float32, copy=True)
        tokens = run.data[recipe.calibration].tokens
        batch = batch_size(len(tokens))
        shape = (*tokens.shape, source.model.config.get_text_config().hidden_size)

        def states() -> Activations:
            disk = run.settings.activations == "disk"
            kept = on_disk(shape, run.store.folder) if disk else in_memory(shape)
            return Activations(kept, batch, run.device)

        wide, spare = states(), states()
        arguments = record_inputs(outer, run.blocks, tokens, batch, wide)
        few = _tokens(run)
        short, short_arguments = self._embedded(outer, few)
        return _States(outer, wide, spare, arguments, few, short, short_arguments)

    def _embedded(self, outer: Any, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """What enters the first block, all windows in one batch, and the blocks' arguments."""
        width = outer.config.get_text_config().hidden_size
        kept = in_memory((*tokens.shape, width))
        whole = Activations(kept, len(tokens), self.run.device)
        arguments = record_inputs(outer, self.run.blocks, tokens, len(tokens), whole)
        return whole[0], arguments

    def _advance(self, states: _States, index: int) -> nn.Module:
        """Take the original's states through a block that is not measured."""
        block = self._block(index)
        with torch.no_grad():
            for number, hidden in enumerate(states.wide):
                states.wide[number] = run_block(block, hidden, states.wide_arguments[index])
            states.short = run_block(block, states.short, states.short_arguments[index])
        return block

    def _block(self, index: int) -> nn.Module:
        return self.run.source.load(
            f"{self.run.blocks.name}.{index}", self.run.device, torch.float32
        )

    @torch.no_grad()
    def _sweep(self, states: _States, blocks: range) -> tuple[Tensor, dict[str, Measured]]:
        """KL [units, windows] of every unit in these blocks, and all that is known of them."""
        streams: dict[str, Tensor] = {}
        found: dict[str, Measured] = {}
        levels: dict[str, float] = {}
        if blocks.start == 0:
            for unit in self.outer:
                errors = self._errors(unit, states.outer.get_submodule(unit.key).weight, None)
                found[unit.key] = Measured(errors)
                levels[unit.key] = errors[str(unit.reference)]
                with self._outer_noise(states.outer, unit.key, levels[unit.key]):
                    streams[unit.key], _ = self._embedded(states.outer, states.tokens)
        dense = states.short
        for index in range(blocks.start, self.count):
            block = self._block(index)
            arguments = states.short_arguments[index]
            for key, hidden in streams.items():
                streams[key] = self._passed(block, hidden, arguments)
            if index in blocks:
                for unit, measured in self._noisy(block, index, states):
                    streams[unit.key] = self._passed(block, dense, arguments)
                    found[unit.key] = measured
            dense = run_block(block, dense, arguments)
            if index == blocks[-1]:
                states.short = dense
            release_memory()
        table = self._divergences(states, dense, streams, levels)
        for key, row in zip(streams, table, strict=True):
            found[key] = replace(found[key], kl=row.tolist())
        return table, found

    def _passed(self, block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        self.clock.done += 1
        if self.clock.due():
            share = self.clock.done / self.clock.total
            self.run.report(f"measuring what bits are worth: {share:.0%}  {self.clock.eta()}")
        return run_block(block, hidden, arguments)

    def _noisy(
        self, block: nn.Module, index: int, states: _States
    ) -> Iterator[tuple[Unit, Measured]]:
        """Every unit of a block while its layers are noisy; the wide states pass the block."""
        prefix = self.run.blocks.prefix(index)
        moments = observe(block, states.wide, states.wide_arguments[index], states.spare)
        states.wide, states.spare = states.spare, states.wide
        damping, seed = self.run.recipe.fit.damping, self.run.recipe.seed
        for unit in self.inside[index]:
            names = [name.removeprefix(prefix) for name in unit.names]
            for name in names:
                if name not in moments:
                    raise RunError(
                        f"no calibration token reached {prefix}{name}; raise --samples or give "
                        "other text with --data"
                    )
            layers = [block.get_submodule(name) for name in names]
            before = [layer.get_parameter("weight") for layer in layers]
            # Of several experts the first stands for all.
            errors = self._errors(unit, before[0], moments[names[0]])
            level = errors[str(unit.reference)]
            for name, layer, weight in zip(names, layers, before, strict=True):
                generator = seeded(seed, f"{prefix}{name} noise")
                noise = shaped(weight, moments[name], damping, generator)
                layer.weight = nn.Parameter(weight + level**0.5 * noise, requires_grad=False)
            yield unit, Measured(errors)
            for layer, weight in zip(layers, before, strict=True):
                layer.weight = weight

    def _errors(self, unit: Unit, weight: Tensor, moment: Tensor | None) -> dict[str, float]:
        schemes = unit.schemes if unit.key in self.tried else [unit.reference]
        generator = seeded(self.run.recipe.seed, f"{unit.key} rows")
        found = fitted(weight, moment, schemes, self.run.recipe, generator)
        return {str(scheme): error for scheme, error in found.items()}

    @contextmanager
    def _outer_noise(self, outer: Any, key: str, level: float | None) -> Iterator[None]:
        """The embedding or head (or both, when tied) with noise, the same every time; without a
        level nothing has any.
        """
        if level is None:
            yield
            return
        weight = outer.get_submodule(key).weight
        kept = weight.detach().clone()
        generator = seeded(self.run.recipe.seed, f"{key} noise")
        weight.add_(rows_like(kept, generator), alpha=level**0.5)
        try:
            yield
        finally:
            weight.copy_(kept)

    def _divergences(
        self, states: _States, dense: Tensor, streams: dict[str, Tensor], levels: dict[str, float]
    ) -> Tensor:
        """KL(original || stream) in nats, mean over the tokens of each window, [streams, windows].

        levels: of the noise in the embedding or head, by their keys.
        """
        table = torch.zeros(len(streams), len(dense), dtype=torch.float64)

        def log_chances(hidden: Tensor, window: int) -> Tensor:
            part = slice(window, window + 1)
            logits = run_head(states.outer, self.run.blocks, states.tokens[part], hidden[part])
            return F.log_softmax(logits.float(), -1)

        for window in range(len(dense)):
            wanted = log_chances(dense, window)
            for row, (key, hidden) in enumerate(streams.items()):
                with self._outer_noise(states.outer, key, levels.get(key)):
                    given = log_chances(hidden, window)
                terms = (wanted.exp() * (wanted - given)).sum(-1, dtype=torch.float64)
                table[row, window] = terms.mean().clamp_min(0).cpu()
        return table
