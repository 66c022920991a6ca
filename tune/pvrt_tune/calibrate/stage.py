"""Calibration block by block: each is quantised on the outputs of the quantised ones before it.
Embedding and output head come last.

One block at a time is in memory. Its dense weights come from the source when its turn comes, its
quantised ones go to the run folder, and only hidden states stay.
"""

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pvrt.errors import RunError
from pvrt.modules.whole_model import decode_once
from pvrt.progress import WARNING, Event
from pvrt_tune.calibrate.block_tuning import Examples, finetune_block
from pvrt_tune.calibrate.ends import quantize_ends, schemes_of_ends, without_head
from pvrt_tune.calibrate.pace import Pace
from pvrt_tune.data.activations import Activations, in_memory, on_disk
from pvrt_tune.data.source_model import fill
from pvrt_tune.fit.layer import empty_like, quantize_linear
from pvrt_tune.machine import compute_dtype, release_memory
from pvrt_tune.model_blocks import batch_size, in_experts, linears, observe, run_block
from pvrt_tune.model_calls import record_inputs
from pvrt_tune.progress import Clock
from pvrt_tune.randomness import seeded
from pvrt_tune.run import ENDS, Run, block_piece
from pvrt_tune.shapes import ModelShape

#: What a line about a block says.
LEGEND = "block: worst layer and its error, output error before and after tuning, codes moved"


@dataclass(frozen=True)
class Stream:
    """What flows through the blocks.

    hidden: outputs of the quantised blocks so far. targets: outputs of the dense block at hand
    (on `hidden`, or in the original model; see `Recipe.targets`). arguments[i]: the other keyword
    arguments of block i (rotary tables, masks) by batch.
    """

    hidden: Activations
    targets: Activations
    arguments: list[list[dict[str, Any]]]

    def keep(self, count: int) -> None:
        """Forget all batches but the first ones."""
        for states in (self.hidden, self.targets):
            states.keep(count)


def calibrate(run: Run, until: float | None = None, *, brief: bool = False) -> None:
    """Quantise all blocks in order, then embedding and head: all of them pieces of the store.

    until: by when blocks should be through (time.monotonic); brief: they are known to need more.
    See `Pace` for what they leave out.
    """
    count, store = len(run.blocks.blocks), run.store
    pieces = [block_piece(index) for index in range(count)]
    tables = schemes_of_ends(run.source.model, run.recipe)
    if all(store.report(name) is not None for name in pieces + [ENDS] * bool(tables)):
        return
    _warn_of_few_tokens(run)
    _begin(run, sum(store.report(name) is not None for name in pieces))
    stream = _start(run)
    clock, again = Clock(count), Clock(count)
    pace = Pace(until, len(stream.hidden), brief)
    for index in range(count):
        dense, started = None, time.monotonic()
        if run.recipe.targets == "original":
            dense = _dense(run, index)
            _advance(run, dense, stream.targets, stream.arguments[index])
        saved = store.load(block_piece(index))
        if saved is not None:
            block = rebuild(run, index, saved.tensors)
            clock.total -= 1
            again.done += 1
            if again.due():
                run.report(f"block {index + 1}/{count} is finished: its outputs are computed again")
        else:
            now, block = run.doing(pace.recipe(run.recipe)), dense or _dense(run, index)
            block, block_report = _quantize_block(now, index, block, stream)
            store.save(block_piece(index), block.state_dict(), block_report)
            clock.done += 1
            run.report(_block_line(index, count, block_report, clock))
        release_memory()
        if index + 1 < count or tables:
            decode_once(block.float())
            _advance(run, block, stream.hidden, stream.arguments[index])
        if saved is None and pace.after(time.monotonic() - started, count - index - 1):
            stream.keep(pace.batches)
            run.report(
                "the time is short: blocks get the fits of effort quick and "
                f"{stream.hidden.windows} windows from here"
            )
        del block, dense  # before the next one comes
    if tables and store.report(ENDS) is None:
        quantize_ends(run.doing(pace.recipe(run.recipe)), tables, stream.hidden)


def _start(run: Run) -> Stream:
    """Embed the windows that calibrate: what enters the first block."""
    source, blocks = run.source, run.blocks
    tokens = run.data[run.recipe.calibration].tokens
    samples, length = tokens.shape
    shape = (samples, length, source.model.config.get_text_config().hidden_size)
    batch = batch_size(samples, length)

    def states() -> Activations:
        disk = run.settings.activations == "disk"
        kept = on_disk(shape, run.store.folder) if disk else in_memory(shape)
        return Activations(kept, batch, run.device)

    hidden, targets = states(), states()
    model = source.partial(without_head(run), run.device)
    arguments = record_inputs(model, blocks, tokens, batch, hidden)
    if run.recipe.targets == "original":
        targets.copy_(hidden)
    return Stream(hidden, targets, arguments)


def start_bytes(model: ModelShape, tokens: int) -> int:
    """Peak of `_start` on a GPU, besides the two stores of hidden states; batches of `tokens`."""
    # Embeddings; hidden states as embedded and in float32; rotary tables, which are narrower.
    return model.itemsize * model.first + tokens * model.width * (model.itemsize + 4 + 2)


def _dense(run: Run, index: int) -> nn.Module:
    """One block of the original model in float32, on the device."""
    return run.source.load(f"{run.blocks.name}.{index}", run.device, torch.float32)


def _quantize_block(
    run: Run, index: int, block: nn.Module, stream: Stream
) -> tuple[nn.Module, dict[str, Any]]:
    """Quantise a dense block in place. Returns it, rounded to the model's own precision, and its
    report.
    """
    started = time.monotonic()
    recipe, prefix, arguments = run.recipe, run.blocks.prefix(index), stream.arguments[index]
    own_targets = stream.targets if recipe.targets == "quantised" else None
    compute = _compute(run)
    moments = observe(block, stream.hidden, arguments, own_targets, compute)
    release_memory()
    dtype = _float_dtype(run.blocks.blocks[index])
    errors, dense = {}, []
    for name, linear in list(linears(block)):
        generator, own = seeded(recipe.seed, f"{prefix}{name}"), run.recipe_of(f"{prefix}{name}")
        divides = own.parsed_scheme.divides(linear.out_features, linear.in_features)
        # A layer that is never called is one whose weight the block reads by itself.
        if not divides or (name not in moments and not in_experts(block, name)):
            dense.append(name)
            continue
        if name not in moments:
            raise RunError(
                f"no calibration token reached {prefix}{name}; raise --samples or give other text "
                "with --data"
            )
        quantised = quantize_linear(linear, moments.pop(name), own, generator, dtype)
        block.set_submodule(name, quantised.module)
        errors[name] = quantised.relative_error
        release_memory()
    if dense:
        run.report(f"{prefix}: {', '.join(dense)} stay dense, which codes cannot stand for")
    generator = seeded(recipe.seed, f"{prefix}finetune")
    examples = Examples(stream.hidden, stream.targets, arguments)
    tuned = finetune_block(block, examples, recipe.settled.finetune, compute, generator)
    report = {
        "errors": errors,
        "output_error": {"before_finetune": tuned.before, "after": tuned.after},
        "moved": tuned.moved,
        "windows": stream.hidden.windows,
        "seconds": time.monotonic() - started,
    }
    return _rounded(block, dtype), report


def _float_dtype(block: nn.Module) -> torch.dtype:
    return next(p.dtype for p in block.parameters() if p.is_floating_point())


def _rounded(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The block with its floating parameters in the model's own type (buffers are left alone)."""
    for parameter in block.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return block


def rebuild(run: Run, index: int, tensors: dict[str, Tensor]) -> nn.Module:
    """A quantised block from its saved tensors; the skeleton says what its layers looked like."""
    skeleton = run.blocks.blocks[index]
    block = deepcopy(skeleton)
    dtype, prefix = _float_dtype(skeleton), run.blocks.prefix(index)
    for name, linear in list(linears(block)):
        if f"{name}.weight" not in tensors:
            block.set_submodule(name, empty_like(linear, run.scheme_of(f"{prefix}{name}"), dtype))
    fill(block, {name: tensor.to(run.device) for name, tensor in tensors.items()}, run.device)
    return block


def _advance(
    run: Run, block: nn.Module, states: Activations, arguments: Sequence[dict[str, Any]]
) -> None:
    """Replace the hidden states by the block's outputs."""
    with torch.no_grad():
        for number, hidden in enumerate(states):
            states[number] = run_block(block, hidden, arguments[number], _compute(run))


def _compute(run: Run) -> torch.dtype:
    """What passes compute products in."""
    return compute_dtype(run.recipe.finetune.compute, run.device)


def _warn_of_few_tokens(run: Run) -> None:
    """Fewer tokens than a layer has inputs leave directions of its weight to chance."""
    tokens, first = run.data[run.recipe.calibration].tokens.numel(), run.blocks.blocks[0]
    name, inputs = max(((n, layer.in_features) for n, layer in linears(first)), key=lambda x: x[1])
    if tokens < inputs:
        text = f"only {tokens} tokens calibrate {name} of {inputs} inputs: expect poor quality; "
        run.report(Event(f"{text}raise --samples or --length", WARNING))


def _block_line(index: int, count: int, report: dict[str, Any], clock: Clock) -> Event:
    """What LEGEND explains, in 80 to 100 columns."""
    worst, error = max(report["errors"].items(), key=lambda item: item[1])
    output = report["output_error"]
    line = (
        f"block {index + 1}/{count}  {worst.rpartition('.')[2]} {error:.3f}  "
        f"output {output['before_finetune']:.4f} -> {output['after']:.4f}  "
        f"moved {report['moved']:.0%}  {report['seconds']:.0f} s  {clock.eta()}"
    )
    return Event(line, "calibration", index + 1, count, clock.left(), **report)


def _begin(run: Run, finished: int) -> None:
    """Say what the lines of blocks mean, and where an earlier call has stopped."""
    if finished:
        run.report(f"going on after block {finished}/{len(run.blocks.blocks)}")
    run.report(LEGEND)
