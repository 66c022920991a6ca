"""The walk over blocks: each is quantised on the outputs of the quantised ones before it."""

import hashlib
import time
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pvrt.errors import RunError
from pvrt.linear import decode_once
from pvrt_tune.blocks import BlockInputs, BlockList, linears, observe, record_inputs, run_block
from pvrt_tune.calibration import CalibrationData
from pvrt_tune.finetune import finetune_block
from pvrt_tune.layerwise import empty_like, quantize_linear
from pvrt_tune.progress import Clock, Report
from pvrt_tune.recipe import Recipe, TuneJob
from pvrt_tune.runstate import RunState
from pvrt_tune.source import Source


def walk(
    job: TuneJob,
    source: Source,
    blocks: BlockList,
    data: CalibrationData,
    state: RunState,
    report: Report,
) -> list[dict[str, Any]]:
    """Quantise all blocks in order, each on the outputs of the quantised ones before it."""
    batch = _batch_size(len(data.tokens))
    inputs = record_inputs(source.model, blocks, data.tokens, batch)
    # The original model's hidden states, where they are the targets; else nothing.
    original = replace(inputs, hidden=list(inputs.hidden))
    if job.recipe.targets == "quantised":
        original.hidden.clear()
    count = len(blocks.blocks)
    clock = Clock(count)
    reports = []
    for index in range(count):
        name = f"block-{index:05d}"
        _advance(blocks.blocks[index], original, index, job.device)
        saved = state.load(name)
        if saved is not None:
            block = _rebuild(blocks.blocks[index], saved.tensors, job.recipe)
            block_report = saved.report
            clock.total -= 1
        else:
            block, block_report = _quantize_block(job, blocks, index, inputs, original.hidden)
            state.save(name, block.state_dict(), block_report)
            clock.done += 1
            report(_block_line(index, count, block_report, clock))
        reports.append(block_report)
        if index + 1 < count:
            _advance(block, inputs, index, job.device)
        # Later stages read the block from here; the dense one is no longer needed.
        blocks.blocks[index] = block.to("cpu")
    return reports


def _batch_size(samples: int) -> int:
    return next(size for size in (4, 2, 1) if samples % size == 0)


def _quantize_block(
    job: TuneJob, blocks: BlockList, index: int, inputs: BlockInputs, original: list[Tensor]
) -> tuple[nn.Module, dict[str, Any]]:
    """Quantise one block. Returns it, rounded to the model's own precision, and its report.

    original: the original model's outputs of this block, the targets of fine-tuning; empty for
    the dense block's outputs on the same inputs.
    """
    started = time.monotonic()
    recipe, arguments = job.recipe, inputs.arguments[index]
    block = deepcopy(blocks.blocks[index]).float().to(job.device)
    hidden = [part.to(job.device) for part in inputs.hidden]
    targets, moments = observe(block, hidden, arguments)
    if original:
        targets = [part.to(job.device) for part in original]
    dtype = _float_dtype(blocks.blocks[index])
    errors = {}
    for name, linear in list(linears(block)):
        if name not in moments:
            raise RunError(
                f"no calibration token reached {blocks.prefix(index)}{name}; raise --samples or "
                "give other text with --data"
            )
        generator = _generator(job, f"{blocks.prefix(index)}{name}")
        quantised = quantize_linear(linear, moments[name], recipe, generator, dtype)
        block.set_submodule(name, quantised.module)
        errors[name] = quantised.relative_error
    generator = _generator(job, f"{blocks.prefix(index)}finetune")
    tuned = finetune_block(block, hidden, targets, arguments, recipe.finetune, generator)
    report = {
        "errors": errors,
        "output_error": {"before_finetune": tuned.before, "after": tuned.after},
        "seconds": time.monotonic() - started,
    }
    return _rounded(block, dtype), report


def _generator(job: TuneJob, name: str) -> torch.Generator:
    """Randomness of one step: depends on seed and name only, so a resumed run repeats it."""
    digest = hashlib.sha256(f"{job.recipe.seed} {name}".encode()).digest()
    return torch.Generator(job.device).manual_seed(int.from_bytes(digest[:8]) >> 1)


def _float_dtype(block: nn.Module) -> torch.dtype:
    return next(p.dtype for p in block.parameters() if p.is_floating_point())


def _rounded(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The block with its floating parameters in the model's own type (buffers are left alone)."""
    for parameter in block.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return block


def _rebuild(dense: nn.Module, tensors: dict[str, Tensor], recipe: Recipe) -> nn.Module:
    """A quantised block from its saved tensors; `dense` says what its layers looked like."""
    block = deepcopy(dense)
    dtype = _float_dtype(dense)
    for name, linear in list(linears(block)):
        if f"{name}.weight" not in tensors:
            block.set_submodule(name, empty_like(linear, recipe, dtype))
    block.load_state_dict(tensors)
    return block


def _advance(block: nn.Module, inputs: BlockInputs, index: int, device: str) -> None:
    """Replace the hidden states by the block's outputs, computed in float32."""
    exact = deepcopy(block).float().to(device)
    decode_once(exact)
    with torch.no_grad():
        for number, hidden in enumerate(inputs.hidden):
            output = run_block(exact, hidden.to(device), inputs.arguments[index])
            inputs.hidden[number] = output.cpu()


def _block_line(index: int, count: int, report: dict[str, Any], clock: Clock) -> str:
    errors = "  ".join(f"{k.rpartition('.')[2]} {v:.4f}" for k, v in report["errors"].items())
    output = report["output_error"]
    return (
        f"block {index + 1}/{count}  {errors}  output {output['before_finetune']:.5f} -> "
        f"{output['after']:.5f}  {report['seconds']:.1f} s  {clock.eta()}"
    )
