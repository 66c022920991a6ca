"""The order of stages: load, calibrate block by block, write the checkpoint."""

import hashlib
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import pvrt
from pvrt.checkpoint import (
    Checkpoint,
    QuantizedLayer,
    WriteOptions,
    quantization_config,
    write_checkpoint,
)
from pvrt.durable import as_json
from pvrt.errors import RunError
from pvrt.linear import AQLMLinear, decode_once, quantized_linears
from pvrt.scheme import Scheme
from pvrt_tune import calibration
from pvrt_tune.additive import FitSettings, fit_layer
from pvrt_tune.blocks import (
    BlockInputs,
    BlockList,
    check_divisible,
    find_blocks,
    linears,
    observe,
    record_inputs,
    run_block,
)
from pvrt_tune.calibration import CalibrationData
from pvrt_tune.finetune import FinetuneSettings, finetune_block
from pvrt_tune.runstate import RunState, open_run
from pvrt_tune.source import Source, load_source


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides model and text. Stored with the run."""

    scheme: str = "2x8g8"
    samples: int = 64
    length: int = 512
    seed: int = 0
    fit: FitSettings = field(default_factory=FitSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)


#: Presets by effort: calibration windows, and how long layers are fitted and blocks tuned.
EFFORTS: dict[str, Recipe] = {
    "fast": Recipe(
        samples=48,
        length=256,
        fit=FitSettings(rounds=3, kmeans_iterations=12),
        finetune=FinetuneSettings(epochs=2),
    ),
    "normal": Recipe(),
    "best": Recipe(
        samples=256,
        length=1024,
        fit=FitSettings(rounds=16, kmeans_iterations=60, kmeans_momentum=0.88),
        finetune=FinetuneSettings(epochs=8),
    ),
}


@dataclass(frozen=True)
class TuneJob:
    """One call of `tune`: what to compress, with what text, to where, and how to start."""

    model: str
    out: Path
    recipe: Recipe
    data: str | None = None
    device: str = "cpu"
    resume: bool = False
    restart: bool = False


Report = Callable[[str], None]


def tune(job: TuneJob, report: Report = print) -> Checkpoint:
    """Compress a model to an AQLM checkpoint in `job.out`; goes on where an earlier call stopped.

    `report` gets progress lines. Raises PvrtError with one sentence for anything that the user can
    mend; KeyboardInterrupt passes through, finished blocks being safe on disk.
    """
    source = load_source(job.model)
    blocks = find_blocks(source.model)
    scheme = Scheme.parse(job.recipe.scheme)
    check_divisible(blocks, scheme)
    text = None
    if job.data is not None:
        size = (job.recipe.samples, job.recipe.length)
        text = calibration.from_text(job.data, source.tokenizer, *size, job.recipe.seed)
    fingerprint = _fingerprint(job, source, text)
    state = open_run(job.out, fingerprint, resume=job.resume, restart=job.restart)
    if state.finished:
        report(f"{job.out} is already complete; --restart tunes it again")
        return Checkpoint.open(job.out)
    source.model.to(job.device)
    data = text or _sampled(job, source, state, report)
    reports = _walk(job, source, blocks, data, state, report)
    _write(job, source, blocks, data, reports)
    state.finish({"blocks": len(blocks.blocks)})
    return Checkpoint.open(job.out)


def _sampled(job: TuneJob, source: Source, state: RunState, report: Report) -> CalibrationData:
    """The model's own text, kept with the run: resuming must not depend on repeating it."""
    saved = state.load("calibration")
    if saved is not None:
        return CalibrationData(saved.tensors["tokens"], saved.report["origin"])
    recipe = job.recipe
    clock = _Clock(recipe.length)

    def progress(done: int, total: int) -> None:
        clock.done = done
        if done == total or clock.due():
            report(f"sampling calibration text: token {done}/{total}  {clock.eta()}")

    report(f"no --data given: sampling {recipe.samples} x {recipe.length} tokens from the model")
    data = calibration.from_model(
        source.model, recipe.samples, recipe.length, recipe.seed, progress
    )
    state.save("calibration", {"tokens": data.tokens}, {"origin": data.origin})
    return data


def _fingerprint(job: TuneJob, source: Source, text: CalibrationData | None) -> dict[str, Any]:
    return {
        "model": source.digest,
        "data": "sampled from the model" if text is None else text.digest,
        "recipe": asdict(job.recipe),
        "versions": {"pvrt": pvrt.__version__, "torch": torch.__version__},
    }


# ---- the walk over blocks ----


def _walk(
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
    scheme = Scheme.parse(job.recipe.scheme)
    count = len(blocks.blocks)
    clock = _Clock(count)
    reports = []
    for index in range(count):
        name = f"block-{index:05d}"
        saved = state.load(name)
        if saved is not None:
            block = _rebuild(blocks.blocks[index], saved.tensors, scheme)
            block_report = saved.report
            clock.total -= 1
        else:
            block, block_report = _quantize_block(job, blocks, index, inputs)
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
    job: TuneJob, blocks: BlockList, index: int, inputs: BlockInputs
) -> tuple[nn.Module, dict[str, Any]]:
    """Quantise one block. Returns it, rounded to the model's own precision, and its report."""
    started = time.monotonic()
    recipe, arguments = job.recipe, inputs.arguments[index]
    scheme = Scheme.parse(recipe.scheme)
    block = deepcopy(blocks.blocks[index]).float().to(job.device)
    hidden = [part.to(job.device) for part in inputs.hidden]
    targets, moments = observe(block, hidden, arguments)
    dtype = _float_dtype(blocks.blocks[index])
    errors = {}
    for name, linear in list(linears(block)):
        if name not in moments:
            raise RunError(
                f"no calibration token reached {blocks.prefix(index)}{name}; raise --samples or "
                "give other text with --data"
            )
        generator = _generator(job, f"{blocks.prefix(index)}{name}")
        fit = fit_layer(linear.weight, moments[name], scheme, recipe.fit, generator, dtype)
        block.set_submodule(name, _as_module(linear, fit.layer, scheme))
        errors[name] = fit.relative_error
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


def _as_module(linear: nn.Linear, layer: QuantizedLayer, scheme: Scheme) -> AQLMLinear:
    module = AQLMLinear(
        linear.in_features,
        linear.out_features,
        scheme,
        linear.bias is not None,
        dtype=torch.float32,
        device=linear.weight.device,
    )
    with torch.no_grad():
        module.codes.copy_(layer.codes)
        module.codebooks.copy_(layer.codebooks)
        module.scales.copy_(layer.scales)
        if linear.bias is not None and module.bias is not None:
            module.bias.copy_(linear.bias)
    return module


def _float_dtype(block: nn.Module) -> torch.dtype:
    return next(p.dtype for p in block.parameters() if p.is_floating_point())


def _rounded(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The block with its floating parameters in the model's own type (buffers are left alone)."""
    for parameter in block.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return block


def _rebuild(dense: nn.Module, tensors: dict[str, Tensor], scheme: Scheme) -> nn.Module:
    """A quantised block from its saved tensors; `dense` says what its layers looked like."""
    block = deepcopy(dense)
    for name, linear in list(linears(block)):
        if f"{name}.codes" in tensors:
            dtype = tensors[f"{name}.codebooks"].dtype
            bias = f"{name}.bias" in tensors
            shape = (linear.in_features, linear.out_features)
            block.set_submodule(name, AQLMLinear(*shape, scheme, bias, dtype=dtype))
    block.load_state_dict(tensors)
    return block


def _advance(block: nn.Module, inputs: BlockInputs, index: int, device: str) -> None:
    """Replace the hidden states by the quantised block's outputs, computed in float32."""
    exact = deepcopy(block).float().to(device)
    decode_once(exact)
    with torch.no_grad():
        for number, hidden in enumerate(inputs.hidden):
            output = run_block(exact, hidden.to(device), inputs.arguments[index])
            inputs.hidden[number] = output.cpu()


# ---- writing ----


def _write(
    job: TuneJob,
    source: Source,
    blocks: BlockList,
    data: CalibrationData,
    reports: list[dict[str, Any]],
) -> None:
    model = source.model.to("cpu")
    scheme = Scheme.parse(job.recipe.scheme)
    quantised = list(quantized_linears(model))
    dense = [name for name, _ in linears(model)]
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    config["architectures"] = [type(model).__name__]
    config["quantization_config"] = quantization_config(scheme, dense, quantised)
    manifest = {
        "pvrt": pvrt.__version__,
        "torch": torch.__version__,
        "scheme": str(scheme),
        "base_model": {"name": Path(source.name).name, "sha256": source.digest},
        "data": {"origin": data.origin, "sha256": data.digest},
        "recipe": asdict(job.recipe),
        "blocks": reports,
    }
    files = _tokenizer_files(source.tokenizer)
    if model.generation_config is not None:
        files["generation_config.json"] = as_json(model.generation_config.to_dict())
    tied = set(model.all_tied_weights_keys)
    tensors = ((name, t) for name, t in model.state_dict().items() if name not in tied)
    write_checkpoint(job.out, config, tensors, WriteOptions(files=files, manifest=manifest))


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


# ---- progress ----


class _Clock:
    """Time left, from the mean of what was done so far."""

    def __init__(self, total: int, every: float = 10.0) -> None:
        self.total, self.every, self.done = total, every, 0
        self.started = self.last = time.monotonic()

    def due(self) -> bool:
        """Whether `every` seconds have passed since this last said so."""
        now = time.monotonic()
        if now - self.last < self.every:
            return False
        self.last = now
        return True

    def eta(self) -> str:
        if not self.done:
            return "ETA unknown"
        left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        return f"ETA {int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"


def _block_line(index: int, count: int, report: dict[str, Any], clock: _Clock) -> str:
    errors = "  ".join(f"{k.rpartition('.')[2]} {v:.4f}" for k, v in report["errors"].items())
    output = report["output_error"]
    return (
        f"block {index + 1}/{count}  {errors}  output {output['before_finetune']:.5f} -> "
        f"{output['after']:.5f}  {report['seconds']:.1f} s  {clock.eta()}"
    )
