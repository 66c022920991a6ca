"""What noise in one unit costs: KL to the original model, on a few windows of calibration text.

The streams of all units of some blocks (a sweep) go through the rest of the model side by side, so
that every block is loaded once per sweep and no more is in memory than calibration has: one stream
of hidden states per unit, as many as calibration's own states have room for. Embedding and output
head are a last sweep, for their noise has the shape of what enters the head. A sweep is a piece of
the run.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvrt.errors import RunError
from pvrt_tune.allocate.errors import fitted, tried
from pvrt_tune.allocate.noise import shaped
from pvrt_tune.allocate.units import Unit
from pvrt_tune.calibrate.ends import ends, head_moment, table_metric
from pvrt_tune.data.activations import Activations, in_memory, on_disk
from pvrt_tune.fit.table import column_sizes
from pvrt_tune.machine import release_memory
from pvrt_tune.model_blocks import batch_size, observe, run_block
from pvrt_tune.model_calls import record_inputs, run_head
from pvrt_tune.progress import Clock
from pvrt_tune.randomness import seeded
from pvrt_tune.run import Run

# Blocks whose units are measured in one sweep, at most: what a kill costs.
_SWEEP_BLOCKS = 4


#: Relative errors of a unit by scheme as text.
Errors = dict[str, float]


@dataclass(frozen=True)
class Measured:
    """Of a unit: errors of fits by scheme as text (see `allocate.errors`), and KL in nats per token
    of each window with noise of the reference's error in the unit.
    """

    errors: Errors
    kl: list[float]


@dataclass
class _States:
    """Hidden states before the block at hand: of all calibration windows, which give the second
    moments, and of the windows that KL is measured on.
    """

    outer: Any
    wide: Activations
    spare: Activations
    wide_arguments: list[list[dict[str, Any]]]
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
    """Blocks of every sweep by the name of its piece; embedding and head come after all blocks."""
    recipe, count = run.recipe, len(run.blocks.blocks)
    per_block = -(-len(units) // count)
    room = recipe.samples * recipe.length // _tokens(run).numel()
    size = min(_SWEEP_BLOCKS, max(1, room // per_block))
    sweeps = {
        f"sensitivity-{first:05d}": range(first, min(first + size, count))
        for first in range(0, count, size)
    }
    ends = any(unit.block is None for unit in units)
    return {**sweeps, **({"sensitivity-ends": range(count, count)} if ends else {})}


def _tokens(run: Run) -> Tensor:
    """The windows that KL is measured on: the beginnings of the first ones that calibrate."""
    settings = run.recipe.allocation
    return run.data[run.recipe.calibration].tokens[: settings.windows, : settings.length]


class _Measurement:
    """The passes through the original model."""

    def __init__(self, run: Run, units: Sequence[Unit]) -> None:
        self.run, self.count = run, len(run.blocks.blocks)
        self.tried = tried(units)
        self.ends = [unit for unit in units if unit.block is None]
        self.inside: dict[int, list[Unit]] = {index: [] for index in range(self.count)}
        for unit in units:
            if unit.block is not None:
                self.inside[unit.block].append(unit)
        self.clock = Clock(0)

    def through(self, sweeps: Mapping[str, range]) -> None:
        """Run all sweeps that the store lacks, in order."""
        store = self.run.store
        missing = [piece for piece in sweeps if store.report(piece) is None]
        self.clock.total = sum(self._passes(sweeps[piece]) for piece in missing)
        states = self._start()
        for piece, blocks in sweeps.items():
            if piece not in missing:
                for index in blocks:
                    self._advance(states, index)
                continue
            kl, found = self._sweep(states, blocks) if blocks else self._ends(states)
            units = {
                key: asdict(Measured(errors, row.tolist()))
                for (key, errors), row in zip(found.items(), kl, strict=True)
            }
            store.save(piece, {"kl": kl}, {"units": units})
        release_memory()

    def _passes(self, blocks: range) -> int:
        """Times that one stream passes one block in a sweep."""
        if not blocks:
            return len(self.ends) * self.count
        return sum(len(self.inside[index]) * (self.count - index) for index in blocks)

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
        batch = batch_size(*tokens.shape)
        shape = (*tokens.shape, source.model.config.get_text_config().hidden_size)

        def states() -> Activations:
            disk = run.settings.activations == "disk"
            kept = on_disk(shape, run.store.folder) if disk else in_memory(shape)
            return Activations(kept, batch, run.device)

        wide, spare = states(), states()
        arguments = record_inputs(outer, run.blocks, tokens, batch, wide)
        few = _tokens(run)
        return _States(outer, wide, spare, arguments, few, *self._embedded(outer, few))

    def _embedded(self, outer: Any, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """What enters the first block, all windows in one batch, and the blocks' arguments."""
        width = outer.config.get_text_config().hidden_size
        whole = Activations(in_memory((*tokens.shape, width)), len(tokens), self.run.device)
        arguments = record_inputs(outer, self.run.blocks, tokens, len(tokens), whole)
        return whole[0], [calls[0] for calls in arguments]

    def _block(self, index: int) -> nn.Module:
        name = f"{self.run.blocks.name}.{index}"
        return self.run.source.load(name, self.run.device, torch.float32)

    @torch.no_grad()
    def _advance(self, states: _States, index: int) -> None:
        """Take the original's states through a block that has been measured."""
        block = self._block(index)
        for number, hidden in enumerate(states.wide):
            states.wide[number] = run_block(block, hidden, states.wide_arguments[index][number])
        states.short = run_block(block, states.short, states.short_arguments[index])

    @torch.no_grad()
    def _sweep(self, states: _States, blocks: range) -> tuple[Tensor, dict[str, Errors]]:
        """KL [units, windows] of every unit in these blocks, and errors by key in this order."""
        streams: dict[str, Tensor] = {}
        found: dict[str, Errors] = {}
        dense = states.short
        for index in range(blocks.start, self.count):
            block, arguments = self._block(index), states.short_arguments[index]
            for key, hidden in streams.items():
                streams[key] = self._passed(block, hidden, arguments)
            if index in blocks:
                for key, errors in self._noisy(block, index, states):
                    streams[key] = self._passed(block, dense, arguments)
                    found[key] = errors
            dense = run_block(block, dense, arguments)
            if index == blocks[-1]:
                states.short = dense
            release_memory()
        kl = torch.zeros(len(streams), len(dense), dtype=torch.float64)
        for window in range(len(dense)):
            wanted = self._log_chances(states, dense, window)
            for row, hidden in enumerate(streams.values()):
                kl[row, window] = _divergence(wanted, self._log_chances(states, hidden, window))
        return kl, found

    def _passed(self, block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        self.clock.done += 1
        if self.clock.due():
            share = self.clock.done / self.clock.total
            line = f"measuring what bits are worth: {share:.0%}"
            self.run.report(self.clock.event("measuring bits", line))
        return run_block(block, hidden, arguments)

    def _noisy(self, block: nn.Module, index: int, states: _States) -> Iterator[tuple[str, Errors]]:
        """Every unit of a block while its layers are noisy; the wide states pass the block."""
        prefix = self.run.blocks.prefix(index)
        moments = observe(block, states.wide, states.wide_arguments[index], states.spare)
        states.wide, states.spare = states.spare, states.wide
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
            for name, layer, weight in zip(names, layers, before, strict=True):
                noise = self._noise(f"{prefix}{name}", weight, moments[name])
                level = errors[str(unit.reference)] ** 0.5
                layer.weight = nn.Parameter(weight + level * noise, requires_grad=False)
            yield unit.key, errors
            for layer, weight in zip(layers, before, strict=True):
                layer.weight = weight

    def _errors(self, unit: Unit, weight: Tensor, moment: Tensor) -> Errors:
        schemes = unit.schemes if unit.key in self.tried else [unit.reference]
        generator = seeded(self.run.recipe.seed, f"{unit.key} rows")
        found = fitted(weight, moment, schemes, self.run.recipe, generator)
        return {str(scheme): error for scheme, error in found.items()}

    def _noise(self, name: str, weight: Tensor, moment: Tensor) -> Tensor:
        generator = seeded(self.run.recipe.seed, f"{name} noise")
        return shaped(weight, moment, self.run.recipe.fit.damping, generator)

    @torch.no_grad()
    def _ends(self, states: _States) -> tuple[Tensor, dict[str, Errors]]:
        """As `_sweep`, of embedding and output head; a tied table is noisy at both ends at once."""
        moment = head_moment(self.run, states.wide)
        wanted = [self._log_chances(states, states.short, n) for n in range(len(states.tokens))]
        kl = torch.zeros(len(self.ends), len(states.tokens), dtype=torch.float64)
        found: dict[str, Errors] = {}
        for row, unit in enumerate(self.ends):
            weight = states.outer.get_submodule(unit.key).weight
            metric = table_metric(ends(self.run.source.model)[unit.key], moment)
            sizes = column_sizes(weight)  # a table is fitted with columns of one size
            scaled, metric = weight / sizes, sizes[:, None] * metric * sizes
            found[unit.key] = self._errors(unit, scaled, metric)
            level = found[unit.key][str(unit.reference)] ** 0.5
            noise = self._noise(unit.key, scaled, metric).mul_(sizes)
            del scaled
            kept = weight.clone()
            weight.add_(noise, alpha=level)
            del noise
            hidden, _ = self._embedded(states.outer, states.tokens)
            for index in range(self.count):
                arguments = states.short_arguments[index]
                hidden = self._passed(self._block(index), hidden, arguments)
            for window, before in enumerate(wanted):
                kl[row, window] = _divergence(before, self._log_chances(states, hidden, window))
            weight.copy_(kept)
        return kl, found

    def _log_chances(self, states: _States, hidden: Tensor, window: int) -> Tensor:
        """Of all tokens at every position of a window, [1, length, vocabulary]."""
        part = slice(window, window + 1)
        logits = run_head(states.outer, self.run.blocks, states.tokens[part], hidden[part])
        return F.log_softmax(logits.float(), -1)


def _divergence(wanted: Tensor, given: Tensor) -> float:
    """KL in nats, mean over positions, of log chances."""
    terms = (wanted.exp() * (wanted - given)).sum(-1, dtype=torch.float64)
    return max(0.0, float(terms.mean()))
