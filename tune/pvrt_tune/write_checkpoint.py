"""The checkpoint of a finished run: config, tensors, tokenizer and manifest."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pvrt.errors import PvrtError
from pvrt.format.atomic import as_json
from pvrt.format.config_block import quantization_config
from pvrt.format.grid import GridLayer, grid_config, open_checkpoint
from pvrt.format.scheme import GridScheme, Scheme
from pvrt.format.write import WriteOptions, add_to_manifest, write_checkpoint
from pvrt.hf.declared import reason
from pvrt.tools import deep
from pvrt.version import __version__
from pvrt_tune.machine import release_memory
from pvrt_tune.progress import Clock
from pvrt_tune.run import Run
from pvrt_tune.settings import Recipe
from pvrt_tune.shapes import ModelShape
from pvrt_tune.side_files import model_config, other_files, tokenizer_files
from pvrt_tune.store import Piece


def write(run: Run, tuned: Mapping[str, Tensor], tuning: Mapping[str, Any]) -> None:
    """Write the finished blocks of a run, and all else from its source, to its output folder.

    The layers whose errors the blocks' reports hold are the quantised ones. `tuned` tensors by name
    take the place of either, `tuning` says how they came about; both may be empty.
    """
    source, data, scheme = run.source, run.data, run.recipe.parsed_scheme
    model, reports = source.model, run.block_reports()
    quantised = {
        source.published(f"{run.blocks.prefix(index)}{name}"): run.scheme_of(
            f"{run.blocks.prefix(index)}{name}"
        )
        for index, report in enumerate(reports)
        for name in report["errors"]
    }
    ends = run.ends()
    tables = {} if ends is None else {n: Scheme.parse(v["scheme"]) for n, v in ends.report.items()}
    in_codes = {id(model.get_submodule(name).weight) for name in tables}
    products = {source.published(name): name for name in _products(model, in_codes)}
    dense = [name for name in products if name not in quantised]
    config = model_config(model)
    if isinstance(scheme, GridScheme):
        # transformers asks for the name of the module, which some files call otherwise.
        own = {products[name] for name in dense}
        config["quantization_config"] = grid_config(scheme, {*dense, *own})
    else:
        config["quantization_config"] = quantization_config(
            {name: form for name, form in quantised.items() if isinstance(form, Scheme)},
            dense,
            {source.published(name): form for name, form in tables.items()},
        )
    manifest = {
        "pvrt": __version__,
        "torch": torch.__version__,
        "versions": run.store.versions,
        "scheme": run.recipe.asked,
        "base_model": {"name": Path(source.name).name, "sha256": source.digest},
        "data": {"origin": data.origin, "sha256": data.digest},
        "recipe": run.recipe.record(),
        "blocks": reports,
        **({} if ends is None else {"ends": ends.report}),
        **({} if run.settings.start is None else {"start": run.settings.start.name}),
        **({"pv": dict(tuning)} if tuning else {}),
    }
    files = {**other_files(source.files[0]), **tokenizer_files(source.tokenizer)}
    if model.generation_config is not None:
        files["generation_config.json"] = as_json(model.generation_config.to_diff_dict())
    tensors = _tensors(run, ends, tuned)
    if isinstance(scheme, GridScheme):
        tensors = _packed(tensors, set(quantised), scheme)
    write_checkpoint(
        run.settings.out, config, tensors, WriteOptions(files=files, manifest=manifest)
    )


def note_greedy(run: Run) -> None:
    """Add the greedy tokens of the written checkpoint to its pvrt.json, for `inspect --deep`.

    It is loaded as its users do. Where that cannot be here (too little memory, no package for
    grids), the run says so and pvrt.json goes without.
    """
    clock = Clock(deep.TOKENS)

    def progress(done: int, total: int) -> None:
        clock.done = done
        if clock.due():
            run.report(clock.event("greedy tokens", f"greedy tokens for pvrt.json: {done}/{total}"))

    release_memory()
    try:
        model = deep.load_for_check(open_checkpoint(run.settings.out))
        found = deep.greedy(model, run.source.tokenizer, progress)
    except Exception as error:  # nothing here may cost a run its end
        said = str(error) if isinstance(error, PvrtError) else reason(error)
        run.report(f"pvrt.json goes without greedy tokens: {said}")
        return
    del model
    release_memory()
    add_to_manifest(run.settings.out, **{deep.GREEDY: found})


def peak_bytes(model: ModelShape, recipe: Recipe) -> int:
    """Peak of `write` in host memory. Tensors that are written as files hold them are not in it."""
    scheme, made, packing = recipe.parsed_scheme, 0, 0
    if recipe.training is not None:  # what was trained in float32 becomes the model's own type
        made = model.itemsize * model.trained(embeddings=not recipe.training.freeze_embeddings)
    if isinstance(scheme, GridScheme):
        made += sum(4 * block.weights // (32 // scheme.bits) for block in model.blocks)
        packing = 2 * 8 * max(block.largest for block in model.blocks)  # int64, and those shifted
    # A shard is written at once. Shapes of layers, and what small tensors take.
    small = 256 * sum(len(block.linears) for block in model.blocks)
    return min(made, WriteOptions().max_shard_bytes) + packing + small


def _products(model: nn.Module, in_codes: set[int]) -> Iterator[str]:
    """Names of all modules that multiply with a weight: linear layers, and routers as
    well, which are linear layers to other readers. Not those whose weight is in in_codes, by
    identity.
    """
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if getattr(weight, "ndim", 0) != 2 or id(weight) in in_codes:
            continue
        if not isinstance(module, nn.Embedding):
            yield name


def _tensors(
    run: Run, ends: Piece | None, tuned: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the checkpoint as files name them, one in memory at a time; tied ones once."""
    source = run.source

    def newest(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        newer = tuned[name].to(tensor.dtype) if name in tuned else tensor
        if name in source.transposed:
            newer = newer.T.contiguous()
        return source.published(name), newer

    brought = run.outside()
    for name in source.outside(run.blocks.name):
        if name in brought:
            yield newest(name, brought[name])
        elif ends is None or name.rpartition(".")[0] not in ends.report:
            yield newest(name, source.read([name])[name])
    for name, tensor in () if ends is None else ends.tensors.items():
        yield newest(name, tensor)
    for prefix, piece in run.finished_blocks():
        for name, tensor in piece.tensors.items():
            yield newest(f"{prefix}{name}", tensor)


def _packed(
    tensors: Iterator[tuple[str, Tensor]], quantised: set[str], scheme: GridScheme
) -> Iterator[tuple[str, Tensor]]:
    """The tensors with every layer on a grid in its packed layout; biases pass as they are."""
    parts = {"codes", "scales"} if scheme.symmetric else {"codes", "scales", "zeros"}
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        layer, _, part = name.rpartition(".")
        if layer not in quantised or part not in parts:
            yield name, tensor
            continue
        held = waiting.setdefault(layer, {})
        held[part] = tensor
        if held.keys() == parts:
            del waiting[layer]
            grid = GridLayer(held["codes"], held["scales"], held.get("zeros"))
            yield from grid.named(layer, scheme)
