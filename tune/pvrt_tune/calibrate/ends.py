"""Embedding and output head in codes, after the blocks.

The output head is fitted in the metric of what the quantised blocks send to it; an embedding that
is no head in the plain metric, for its rows enter a sum that is normalised next. A tied table is
both, and the head's part is what matters: rounded alone, the table of SmolLM2 costs 16 times as
much KL as output head than as embedding. For the same reason the blocks need not see it quantised.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pvrt.errors import RunError
from pvrt.format.scheme import Scheme
from pvrt.modules.aqlm_embedding import AQLMEmbedding, TiedHead, embedding_scale
from pvrt.modules.whole_model import layer_in_codes
from pvrt_tune.data.activations import Activations
from pvrt_tune.data.source_model import fill
from pvrt_tune.fit import additive
from pvrt_tune.fit.table import ROWS, fit_table
from pvrt_tune.machine import release_memory
from pvrt_tune.model_calls import head_inputs
from pvrt_tune.progress import Clock
from pvrt_tune.randomness import seeded
from pvrt_tune.run import ENDS, Run
from pvrt_tune.settings import FitSettings, Recipe
from pvrt_tune.shapes import TableShape
from pvrt_tune.store import Piece

#: What the plain metric weighs in that of a tied table. With equal parts the head costs seven times
#: as much KL as the embedding (SmolLM2 in 4x8g8: 0.044 and 0.006).
_EMBEDDING_SHARE = 0.1


@dataclass(frozen=True)
class End:
    """An embedding or output head; `multiplies` says whether logits come from it (an embedding that
    the head is tied to does)."""

    module: Any
    multiplies: bool


def ends(model: Any) -> dict[str, End]:
    """Embedding and output head of a model by name, those that codes can stand for.

    A head that is tied to the embedding has no name of its own here.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    head_weight = f"{names[id(head)]}.weight" if isinstance(head, nn.Linear) else ""
    tied = dict(model.all_tied_weights_keys)
    found: dict[str, End] = {}
    if isinstance(embedding, nn.Embedding) and embedding_scale(embedding) is not None:
        name = names[id(embedding)]
        users = {target for target, source in tied.items() if source == f"{name}.weight"}
        if users <= {head_weight}:
            found[name] = End(embedding, bool(users))
    if head_weight and head_weight not in tied:
        found[names[id(head)]] = End(head, True)
    return found


def schemes_of_ends(model: Any, recipe: Recipe) -> dict[str, Scheme]:
    """The schemes of embedding and output head by name; of those that stay dense there is none.

    "auto" leaves a table dense that codes would not make smaller, and both beside grids, whose
    layout has no embeddings. Raises RunError for a scheme that cannot be.
    """
    wanted = recipe.embedding_schemes
    found = {}
    for name, end in ends(model).items() if wanted else ():
        rows, width = end.module.weight.shape
        usable = [scheme for scheme in wanted if scheme.divides(rows, width)]
        if usable and table_bits(usable[0], rows, width) < 16 * rows * width:
            found[name] = usable[0]
        elif recipe.embeddings != "auto":
            raise RunError(
                f"embeddings: codes of {recipe.embeddings} do not make {name} of {rows} x {width} "
                "smaller; --keep-embeddings leaves it in 16 bits"
            )
    return found


def table_bits(scheme: Scheme, rows: int, width: int, float_bits: int = 16) -> int:
    """Bits of a table in codes, all that decoding needs included."""
    return scheme.layer_bits(rows, width, float_bits) + width * float_bits


def peak_bytes(table: TableShape, settings: FitSettings, itemsize: int, device: str) -> int:
    """Peak of `quantize_ends` for one table of numbers of itemsize bytes."""
    some = (min(table.rows, ROWS), table.width)
    fit = additive.peak_bytes(some, table.scheme, settings, device)
    # The table itself, its codes in parts and whole, moments, and rows of it in float32.
    moments = 3 * 4 * table.width**2
    return itemsize * table.weights + 2 * table.codes + moments + 2 * 4 * prod(some) + fit


def quantize_ends(run: Run, schemes: Mapping[str, Scheme], hidden: Activations) -> None:
    """Fit embedding and output head and leave them as a piece of the run's store.

    schemes: by name, where the run has none of its own. hidden: outputs of the last quantised
    block.
    """
    found, moment = ends(run.source.model), head_moment(run, hidden)
    tensors: dict[str, Tensor] = {}
    report = {}
    for name, default in schemes.items():
        scheme = run.schemes.get(name, default)
        read = run.source.read(run.source.inside(name), run.device)
        weight = read[f"{name}.weight"]
        metric = table_metric(found[name], moment)
        recipe = replace(run.recipe, scheme=str(scheme), bits=None)
        generator = seeded(recipe.seed, name)
        fit = fit_table(weight, metric, recipe, generator, _progress(run, name))
        tensors.update(replace(fit.layer, bias=read.get(f"{name}.bias")).named(name))
        report[name] = {"scheme": str(scheme), "error": fit.relative_error}
        run.report(f"{name}  {scheme}  {fit.relative_error:.4f}")
        release_memory()
    run.store.save(ENDS, tensors, report)


def table_metric(end: End, moment: Tensor) -> Tensor:
    """What errors of a table cost, [width, width]: as output head, as embedding, or as both."""
    plain = torch.eye(len(moment), device=moment.device)
    if not end.multiplies:
        return plain
    normed = moment / moment.diagonal().mean().clamp_min(1e-30)
    if not isinstance(end.module, nn.Embedding):
        return normed
    return (1 - _EMBEDDING_SHARE) * normed + _EMBEDDING_SHARE * plain


def head_moment(run: Run, hidden: Activations) -> Tensor:
    """Mean of x x^T [width, width] over what enters the output head."""
    source, blocks = run.source, run.blocks
    model = source.partial(without_head(run), run.device)
    # A time limit may have left some out.
    tokens = run.data[run.recipe.calibration].tokens[: hidden.windows]
    total: Tensor | None = None
    count = 0
    for x in head_inputs(model, blocks, tokens, hidden):
        product = x.float().T @ x.float()
        total = product if total is None else total + product
        count += len(x)
    assert total is not None
    return total / count


def without_head(run: Run) -> list[str]:
    """Names of all stored tensors outside of the blocks that nothing but the output head reads."""
    model = run.source.model
    head = model.get_output_embeddings()
    unused = {id(tensor) for tensor in head.state_dict(keep_vars=True).values()} if head else set()
    everything = model.state_dict(keep_vars=True)
    outside = run.source.outside(run.blocks.name)
    return [name for name in outside if id(everything[name]) not in unused]


def put_ends(model: Any, piece: Piece, device: str) -> None:
    """Put embedding and output head in codes in the place of a model's own."""
    for name, noted in piece.report.items():
        scheme, old = Scheme.parse(noted["scheme"]), model.get_submodule(name)
        part = {key: piece.tensors[key] for key in piece.tensors if key.startswith(f"{name}.")}
        bias, dtype = f"{name}.bias" in part, part[f"{name}.codebooks"].dtype
        new = layer_in_codes(old, scheme, bias, True, dtype)
        assert new is not None
        tensors = {key.removeprefix(f"{name}."): t.to(device) for key, t in part.items()}
        fill(new, tensors, device)
        head = model.get_output_embeddings()
        model.set_submodule(name, new)
        if isinstance(new, AQLMEmbedding) and getattr(head, "weight", None) is old.weight:
            model.set_output_embeddings(TiedHead(new, head.bias))


def _progress(run: Run, name: str) -> Callable[[int, int], None]:
    clock = Clock(1)

    def progress(done: int, total: int) -> None:
        clock.done, clock.total = done, total
        if clock.due():
            run.report(clock.event("embedding fit", f"{name}: part {done}/{total}"))

    return progress
