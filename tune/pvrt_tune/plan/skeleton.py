"""What a model's skeleton says before a weight is read: its shapes, and the checkpoint to come."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt.modules.experts import ExpertList
from pvrt_tune.calibrate.ends import schemes_of_ends
from pvrt_tune.fit.grid import GridLinear
from pvrt_tune.fit.layer import empty_like
from pvrt_tune.model_blocks import divisible, find_blocks, linears
from pvrt_tune.settings import Recipe
from pvrt_tune.shapes import BlockShape, ModelShape, TableShape


@dataclass(frozen=True)
class Result:
    """The checkpoint: bytes of its tensors, and bits per weight over linears and over all."""

    file_bytes: int
    bits_per_weight_linears: float
    bits_per_weight_file: float
    dense_model_bytes: int


def model_shape(model: Any, recipe: Recipe) -> ModelShape:
    """Sizes of a skeleton and of what a recipe makes of it; SourceError if it has no blocks."""
    blocks, config = find_blocks(model), model.config.get_text_config()
    tied = model.all_tied_weights_keys
    outside = {
        name: parameter.numel()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in tied and not name.startswith(f"{blocks.name}.")
    }
    head = model.get_output_embeddings()
    last = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    routed = getattr(config, "num_experts_per_tok", None) or 1
    return ModelShape(
        blocks=tuple(
            block_shape(block, [module for _, module in _quantised(block, recipe)], routed)
            for block in blocks.blocks
        ),
        outside=sum(outside.values()),
        first=sum(n for name, n in outside.items() if id(model.get_parameter(name)) not in last),
        vocabulary=config.vocab_size,
        width=config.hidden_size,
        itemsize=model.dtype.itemsize,
        ends=tuple(
            TableShape(rows, width, scheme)
            for name, scheme in schemes_of_ends(model, recipe).items()
            for rows, width in [model.get_submodule(name).weight.shape]
        ),
    )


def block_shape(
    block: nn.Module, quantised: Sequence[AQLMLinear | GridLinear], experts_per_token: int = 1
) -> BlockShape:
    """Shapes of a skeleton's block; `quantised` are the modules to take its linears' places."""
    siblings: dict[str, list[nn.Linear]] = {}
    for name, linear in linears(block):
        siblings.setdefault(name.rpartition(".")[0], []).append(linear)
    # The share of tokens that pass a layer.
    share = {
        f"{name}.{index}": experts_per_token / len(list(module.children()))
        for name, module in block.named_modules()
        if isinstance(module, ExpertList)
        for index, _ in module.named_children()
    }
    inputs: list[int] = []
    read = written = passive = 0.0
    for name, layers in siblings.items():
        widths = [layer.in_features for layer in layers]
        # The last of several (the output projection) reads what the others made.
        own = [*set(widths), *([widths[-1]] if widths.count(widths[-1]) > 1 else [])]
        # Moments of experts are filled up one by one.
        inputs += widths if name in share else own
        read += share.get(name, 1) * sum(own)
        written += share.get(name, 1) * sum(layer.out_features for layer in layers)
        passive += (1 - share.get(name, 1)) * sum(layer.weight.numel() for layer in layers)
    dense = dict(block.named_parameters())
    made = [parameter for module in quantised for parameter in module.parameters()]
    replaced = sum(m.out_features * (m.in_features + (m.bias is not None)) for m in quantised)
    parameters = sum(p.numel() for p in dense.values())
    floats = sum(p.numel() for p in made if p.is_floating_point())
    return BlockShape(
        parameters=parameters,
        linears=tuple((layer.out_features, layer.in_features) for _, layer in linears(block)),
        inputs=tuple(inputs),
        read=read,
        written=written,
        active=parameters - passive,
        widest=max(sum(layer.out_features for layer in part[:-1]) for part in siblings.values()),
        norms=sum(p.numel() for n, p in dense.items() if p.dim() == 1 and "weight" in n),
        codes=sum(p.nbytes for p in made if not p.is_floating_point()),
        floats=parameters - replaced + floats,
        groups=sum(prod(m.codes.shape[:2]) for m in quantised if isinstance(m, AQLMLinear)),
        on_grids=sum(m.codes.numel() for m in quantised if isinstance(m, GridLinear)),
    )


def result_of(model: Any, recipe: Recipe, shape: ModelShape) -> Result:
    """The checkpoint that a recipe makes of a skeleton."""
    scheme, size = recipe.parsed_scheme, shape.itemsize * shape.dense + shape.stored
    bits = 0
    for block in find_blocks(model).blocks:
        for linear, module in _quantised(block, recipe):
            bits += scheme.layer_bits(linear.out_features, linear.in_features, 8 * shape.itemsize)
            if isinstance(module, GridLinear):
                size += module.packed_bytes - sum(p.nbytes for p in module.parameters())
    weights = sum(block.weights for block in shape.blocks)
    dense = shape.itemsize * shape.parameters
    return Result(size, bits / weights, 8 * size / shape.parameters, dense)


def _quantised(
    block: nn.Module, recipe: Recipe
) -> Iterator[tuple[nn.Linear, AQLMLinear | GridLinear]]:
    """Every layer to quantise, and its quantised module on the meta device."""
    with torch.device("meta"):
        for _, linear in divisible(block, recipe.parsed_scheme):
            yield linear, empty_like(linear, recipe.parsed_scheme, linear.weight.dtype)
