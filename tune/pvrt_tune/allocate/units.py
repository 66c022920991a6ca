"""What gets a scheme of its own: a layer, the experts of a block that engines fuse, embeddings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from pvrt.errors import SourceError
from pvrt.format.scheme import Scheme
from pvrt.modules.experts import ExpertList
from pvrt_tune.calibrate.ends import schemes_of_ends, table_bits
from pvrt_tune.model_blocks import BlockList, linears
from pvrt_tune.settings import Recipe

#: Of 1 to 6 bits. Those of one rate differ in how much their codebooks take: 1x8g4 and 2x8g4 are
#: for small layers, and for inputs that no group of 8 divides.
SCHEMES = tuple(
    Scheme.parse(text)
    for text in (
        "1x8g8",
        "3x8g16",
        "1x8g4",
        "2x8g8",
        "5x8g16",
        "3x8g8",
        "2x8g4",
        "4x8g8",
        "5x8g8",
        "3x8g4",
    )
)
# The first of these that divides a unit is its reference: noise of its error is injected.
_REFERENCES = tuple(Scheme.parse(text) for text in ("2x8g8", "1x8g4"))


@dataclass(frozen=True)
class Unit:
    """Layers of one scheme, which are measured together.

    names: of its modules in the model; shapes: (out, in) of each. block: index of theirs, None for
    embedding and output head. schemes: those that divide all of its layers.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    block: int | None
    schemes: tuple[Scheme, ...]

    @classmethod
    def of(cls, modules: Sequence[tuple[str, nn.Module]], block: int | None) -> "Unit":
        """The unit of some modules. Raises SourceError when no scheme divides them."""
        weights = [module.get_parameter("weight") for _, module in modules]
        shapes = tuple((weight.shape[0], weight.shape[1]) for weight in weights)
        schemes = tuple(
            scheme for scheme in SCHEMES if all(scheme.divides(*shape) for shape in shapes)
        )
        if not schemes:
            raise SourceError(
                f"{modules[0][0]} has {shapes[0][1]} inputs, which groups of 4 do not divide; "
                "--bits needs one that does"
            )
        return cls(tuple(name for name, _ in modules), shapes, block, schemes)

    @property
    def key(self) -> str:
        """Its name in reports."""
        return self.names[0]

    @property
    def reference(self) -> Scheme:
        """The scheme that it is fitted in whatever it gets later."""
        return next((one for one in _REFERENCES if one in self.schemes), self.schemes[0])

    @property
    def weights(self) -> int:
        """Weights of all its layers."""
        return sum(out * inputs for out, inputs in self.shapes)

    def bits(self, scheme: Scheme, float_bits: int) -> int:
        """Bits of all its layers in a scheme, all that decoding needs included."""
        stored = scheme.layer_bits if self.block is not None else partial(table_bits, scheme)
        return sum(stored(*shape, float_bits) for shape in self.shapes)


def find_units(model: Any, blocks: BlockList, recipe: Recipe) -> list[Unit]:
    """All units of a skeleton: block by block, then those of embedding and output head that the
    recipe does not keep.

    Raises SourceError for a layer that no scheme divides, RunError for a scheme of embeddings that
    cannot be.
    """
    found = [
        Unit.of([(f"{blocks.prefix(index)}{name}", layer) for name, layer in part], index)
        for index, block in enumerate(blocks.blocks)
        for part in _together(block)
    ]
    for name, scheme in schemes_of_ends(model, recipe).items():
        unit = Unit.of([(name, model.get_submodule(name))], None)
        fixed = recipe.embeddings != "auto"
        found.append(replace(unit, schemes=(scheme,)) if fixed else unit)
    return found


def _together(block: nn.Module) -> Iterator[list[tuple[str, nn.Linear]]]:
    """Layers of a block by unit: all gate and up projections of a list of experts are one, all of
    its down projections another.
    """
    kinds = {
        f"{name}.{index}.{projection}": f"{name}.{'down' if projection == module.names[-1] else ''}"
        for name, module in block.named_modules()
        if isinstance(module, ExpertList)
        for index, _ in module.named_children()
        for projection in module.names
    }
    units: dict[str, list[tuple[str, nn.Linear]]] = {}
    for name, layer in linears(block):
        units.setdefault(kinds.get(name, name), []).append((name, layer))
    yield from units.values()
