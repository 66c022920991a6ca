"""The walk over blocks: each is quantised on the outputs of the quantised ones before it.

One block at a time is in memory. Its dense weights come from the source when its turn comes, its
quantised ones go to the run folder, and only hidden states stay.
"""

import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pvrt.errors import RunError
from pvrt.modules.aqlm_linear import decode_once
from pvrt_tune.calibrate.block_tuning import finetune_block
from pvrt_tune.data.activations import Activations, in_memory, on_disk
from pvrt_tune.data.source_model import Source, fill
from pvrt_tune.data.text import CalibrationData
from pvrt_tune.fit.layer import empty_like, quantize_linear
from pvrt_tune.machine import release_memory
from pvrt_tune.model_blocks import BlockList, batch_size, linears, observe, record_inputs, run_block
from pvrt_tune.progress import Clock, Report
from pvrt_tune.randomness import seeded
from pvrt_tune.run import Piece, RunState
from pvrt_tune.settings import TuneJob


@dataclass(frozen=True)
class Stream:
    """What flows through the blocks.

    hidden: outputs of the quantised blocks so far. targets: outputs of the dense block at hand
    (on `hidden`, or in the original model; see `Recipe.targets`). arguments[i]: the other keyword
    arguments of block i (rotary tables, masks), the same for every batch.
    """

    hidden: Activations
    targets: Activations
    arguments: list[dict[str, Any]]


def walk(
    job: TuneJob,
    source: Source,
    blocks: BlockList,
    data: CalibrationData,
    state: RunState,
    report: Report,
) -> list[dict[str, Any]]:
    """Quantise all blocks in order and leave them as pieces of `state`. Returns their reports."""
    count = len(blocks.blocks)
    finished = [state.report(piece_name(index)) for index in range(count)]
    if None not in finished:
        return [piece for piece in finished if piece is not None]
    stream = _start(job, source, blocks, data, state)
    clock, again = Clock(count), Clock(count)
    reports = []
    for index in range(count):
        name = piece_name(index)
        dense = None
        if job.recipe.targets == "original":
            dense = _dense(job, source, blocks, index)
            _advance(dense, stream.targets, stream.arguments[index])
        saved = state.load(name)
        if saved is not None:
            block = rebuild(blocks.blocks[index], saved.tensors, job)
            block_report = saved.report
            clock.total -= 1
            again.done += 1
            if again.due():
                report(f"block {index + 1}/{count} is finished: its outputs are computed again")
        else:
            dense = dense or _dense(job, source, blocks, index)
            block, block_report = _quantize_block(job, blocks, index, dense, stream)
            state.save(name, block.state_dict(), block_report)
            clock.done += 1
            report(_block_line(index, count, block_report, clock))
        release_memory()
        reports.append(block_report)
        if index + 1 < count:
            decode_once(block.float())
            _advance(block, stream.hidden, stream.arguments[index])
        del block, dense  # before the next one comes
    return reports


def piece_name(index: int) -> str:
    """Name of a finished block among the pieces of a run."""
    return f"block-{index:05d}"


def finished_blocks(blocks: BlockList, state: RunState) -> Iterator[tuple[str, Piece]]:
    """(dotted prefix, piece) of all blocks in order; the walk must be through.

    Raises RunError when a piece has been damaged since.
    """
    for index in range(len(blocks.blocks)):
        piece = state.load(piece_name(index))
        if piece is None:
            raise RunError(
                f"{piece_name(index)} in {state.folder} was damaged or removed during the run; "
                "the same command makes it again"
            )
        yield blocks.prefix(index), piece


def _start(
    job: TuneJob, source: Source, blocks: BlockList, data: CalibrationData, state: RunState
) -> Stream:
    """Embed all windows: what enters the first block."""
    samples, length = data.tokens.shape
    shape = (samples, length, source.model.config.get_text_config().hidden_size)
    batch = batch_size(samples)

    def store() -> Activations:
        kept = on_disk(shape, state.folder) if job.activations == "disk" else in_memory(shape)
        return Activations(kept, batch, job.device)

    hidden, targets = store(), store()
    head = source.model.get_output_embeddings()
    unused = {id(tensor) for tensor in head.state_dict(keep_vars=True).values()} if head else set()
    everything = source.model.state_dict(keep_vars=True)
    names = [name for name in source.outside(blocks.name) if id(everything[name]) not in unused]
    model = source.partial(names, job.device)
    arguments = record_inputs(model, blocks, data.tokens, batch, hidden)
    if job.recipe.targets == "original":
        targets.copy_(hidden)
    return Stream(hidden, targets, arguments)


def _dense(job: TuneJob, source: Source, blocks: BlockList, index: int) -> nn.Module:
    """One block of the original model in float32, on the device."""
    return source.load(f"{blocks.name}.{index}", job.device, torch.float32)


def _quantize_block(
    job: TuneJob, blocks: BlockList, index: int, block: nn.Module, stream: Stream
) -> tuple[nn.Module, dict[str, Any]]:
    """Quantise a dense block in place. Returns it, rounded to the model's own precision, and its
    report.
    """
    started = time.monotonic()
    recipe, arguments = job.recipe, stream.arguments[index]
    own_targets = stream.targets if recipe.targets == "quantised" else None
    moments = observe(block, stream.hidden, arguments, own_targets)
    release_memory()
    dtype = _float_dtype(blocks.blocks[index])
    errors = {}
    for name, linear in list(linears(block)):
        if name not in moments:
            raise RunError(
                f"no calibration token reached {blocks.prefix(index)}{name}; raise --samples or "
                "give other text with --data"
            )
        generator = seeded(recipe.seed, f"{blocks.prefix(index)}{name}")
        quantised = quantize_linear(linear, moments.pop(name), recipe, generator, dtype)
        block.set_submodule(name, quantised.module)
        errors[name] = quantised.relative_error
        release_memory()
    generator = seeded(recipe.seed, f"{blocks.prefix(index)}finetune")
    tuned = finetune_block(
        block, stream.hidden, stream.targets, arguments, recipe.finetune, generator
    )
    report = {
        "errors": errors,
        "output_error": {"before_finetune": tuned.before, "after": tuned.after},
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


def rebuild(skeleton: nn.Module, tensors: dict[str, Tensor], job: TuneJob) -> nn.Module:
    """A quantised block from its saved tensors; the skeleton says what its layers looked like."""
    block = deepcopy(skeleton)
    dtype = _float_dtype(skeleton)
    for name, linear in list(linears(block)):
        if f"{name}.weight" not in tensors:
            block.set_submodule(name, empty_like(linear, job.recipe, dtype))
    fill(block, {name: tensor.to(job.device) for name, tensor in tensors.items()}, job.device)
    return block


def _advance(block: nn.Module, states: Activations, arguments: dict[str, Any]) -> None:
    """Replace the hidden states by the block's outputs."""
    with torch.no_grad():
        for number, hidden in enumerate(states):
            states[number] = run_block(block, hidden, arguments)


def _block_line(index: int, count: int, report: dict[str, Any], clock: Clock) -> str:
    errors = "  ".join(f"{k.rpartition('.')[2]} {v:.4f}" for k, v in report["errors"].items())
    output = report["output_error"]
    return (
        f"block {index + 1}/{count}  {errors}  output {output['before_finetune']:.5f} -> "
        f"{output['after']:.5f}  {report['seconds']:.1f} s  {clock.eta()}"
    )
