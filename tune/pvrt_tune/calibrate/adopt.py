"""A checkpoint in the place of calibration: what PV-Tuning goes on from.

Its tensors become the pieces that calibration would leave, whoever made them.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from torch import Tensor

from pvrt.errors import RunError
from pvrt.format.aqlm import Checkpoint
from pvrt.format.config_block import CONFIG_FILE
from pvrt.format.grid import GridCheckpoint
from pvrt.format.scheme import GridScheme, Scheme
from pvrt_tune.calibrate.ends import ends
from pvrt_tune.data.source_model import Source
from pvrt_tune.data.stored_weights import digest_of
from pvrt_tune.model_blocks import BlockList, linears
from pvrt_tune.run import ENDS, OUTSIDE, Run, block_piece

#: What `open_checkpoint` opens.
Start = Checkpoint | GridCheckpoint


def start_digest(checkpoint: Start) -> str:
    """SHA-256 of a checkpoint, as of a source."""
    files = sorted({info.file for info in checkpoint.tensors.values()})
    return digest_of((checkpoint.path / CONFIG_FILE, *files))


def schemes_of(
    checkpoint: Start, source: Source, blocks: BlockList
) -> dict[str, Scheme | GridScheme]:
    """Schemes of a checkpoint's layers by their names in the source's model.

    Raises RunError where a layer of the checkpoint is none of the model, or of another shape.
    """
    found = {}
    for name, shape in _weights(source.model, blocks):
        info = checkpoint.layers.get(source.published(name))
        if info is None:
            continue
        if (info.out_features, info.in_features) != shape:
            sizes = f"{info.out_features} x {info.in_features}, not {shape[0]} x {shape[1]}"
            raise _stranger(checkpoint, source, f"{info.name} is {sizes}")
        found[name] = info.scheme
    strange = checkpoint.layers.keys() - {source.published(name) for name in found}
    if strange:
        raise _stranger(checkpoint, source, f"the latter has no layer {min(strange)}")
    return found


def adopt(run: Run, checkpoint: Start) -> None:
    """Leave all tensors of a checkpoint as finished blocks, tables, and what is beside them.

    Raises RunError where the checkpoint lacks a tensor of the model or has one of another shape.
    """
    source, store = run.source, run.store
    for index, block in enumerate(run.blocks.blocks):
        if store.report(block_piece(index)) is not None:
            continue
        prefix = run.blocks.prefix(index)
        layers = [name for name, _ in linears(block) if f"{prefix}{name}" in run.schemes]
        tensors = {
            f"{name}.{part}": tensor
            for name in layers
            for part, tensor in _layer(checkpoint, source.published(f"{prefix}{name}"))
        }
        dense = [key for key in source.inside(prefix[:-1]) if not _inside(key, prefix, layers)]
        for key, tensor in _dense(checkpoint, source, dense):
            tensors[key.removeprefix(prefix)] = tensor
        store.save(block_piece(index), tensors, {"errors": dict.fromkeys(layers)})
    outside = source.outside(run.blocks.name)
    tables = [name for name in run.schemes if f"{name}.weight" in outside]
    if tables and store.report(ENDS) is None:
        parts = {
            f"{name}.{part}": tensor
            for name in tables
            for part, tensor in _layer(checkpoint, source.published(name))
        }
        report = {name: {"scheme": str(run.schemes[name])} for name in tables}
        store.save(ENDS, parts, report)
    if store.report(OUTSIDE) is None:
        kept = [key for key in outside if not _inside(key, "", tables)]
        store.save(OUTSIDE, dict(_dense(checkpoint, source, kept)), {})


def _weights(model: Any, blocks: BlockList) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of all weights that may be in codes."""
    for index, block in enumerate(blocks.blocks):
        for name, linear in linears(block):
            yield f"{blocks.prefix(index)}{name}", (linear.out_features, linear.in_features)
    for name, end in ends(model).items():
        yield name, tuple(end.module.weight.shape)


def _layer(checkpoint: Start, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a quantised layer by part, as its module has them."""
    layer = checkpoint.read_layer(name)
    for field in fields(layer):
        tensor = getattr(layer, field.name)
        if tensor is not None:
            yield field.name, tensor


def _inside(key: str, prefix: str, layers: list[str]) -> bool:
    """Whether a tensor belongs to one of the quantised layers."""
    return key.removeprefix(prefix).rpartition(".")[0] in layers


def _dense(checkpoint: Start, source: Source, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Dense tensors by their names in the model, in its own type."""
    for name in names:
        wanted, published = source.model.get_parameter(name), source.published(name)
        if published not in checkpoint.tensors:
            raise _stranger(checkpoint, source, f"the former has no tensor {published}")
        tensor = checkpoint.read(published)
        if tensor.shape != wanted.shape:
            sizes = f"{list(tensor.shape)}, not {list(wanted.shape)}"
            raise _stranger(checkpoint, source, f"{published} has the shape {sizes}")
        yield name, tensor.to(wanted.dtype)


def _stranger(checkpoint: Start, source: Source, why: str) -> RunError:
    return RunError(
        f"{checkpoint.path} was not made of {source.name} ({why}); give its own original to --from"
    )
