"""What every stage of a tuning run is handed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from pvrt.errors import RunError
from pvrt.format.scheme import GridScheme, Scheme
from pvrt_tune.data.source_model import Source
from pvrt_tune.data.text import CalibrationData
from pvrt_tune.model_blocks import BlockList
from pvrt_tune.progress import Report
from pvrt_tune.settings import Recipe, TuneJob
from pvrt_tune.store import Piece, Store


@dataclass(frozen=True)
class Run:
    """A tuning run at work.

    settings: the call of `tune`, on this process's device. source: the dense model, and `blocks`
    its decoder blocks. data: all windows of text, those held out by PV-Tuning first. store: what is
    finished. report: takes lines of progress. schemes: of layers, embedding and output head by
    their names in the model, where they differ from the recipe's.
    """

    settings: TuneJob
    source: Source
    blocks: BlockList
    data: CalibrationData
    store: Store
    report: Report
    schemes: Mapping[str, Scheme | GridScheme] = field(default_factory=dict)

    def doing(self, recipe: Recipe) -> "Run":
        """The run at work on another recipe, shorter say."""
        return replace(self, settings=replace(self.settings, recipe=recipe))

    def recipe_of(self, name: str) -> Recipe:
        """The recipe with the scheme of one layer."""
        return replace(self.recipe, scheme=str(self.scheme_of(name)), bits=None)

    def scheme_of(self, name: str) -> Scheme | GridScheme:
        """The scheme of a layer inside the blocks."""
        return self.schemes.get(name, self.recipe.parsed_scheme)

    @property
    def recipe(self) -> Recipe:
        """What decides the result."""
        return self.settings.recipe

    @property
    def device(self) -> str:
        """Where this process computes."""
        return self.settings.device

    def finished_blocks(self) -> Iterator[tuple[str, Piece]]:
        """(dotted prefix, piece) of all blocks in order; all must be calibrated.

        Raises RunError when a piece has been damaged since.
        """
        for index in range(len(self.blocks.blocks)):
            yield self.blocks.prefix(index), self._finished(block_piece(index))

    def ends(self) -> Piece | None:
        """Embedding and output head in codes; None where they stay dense.

        Raises RunError when they have been damaged since.
        """
        return self._finished(ENDS) if self.store.parts(ENDS) else None

    def outside(self) -> Mapping[str, Tensor]:
        """Tensors outside of the blocks, by name, that a checkpoint brought along; others are the
        source's.

        Raises RunError when they have been damaged since.
        """
        return self._finished(OUTSIDE).tensors if self.store.parts(OUTSIDE) else {}

    def _finished(self, name: str) -> Piece:
        piece = self.store.load(name)
        if piece is None:
            raise RunError(
                f"{name} in {self.store.folder} was damaged or removed during the run; the same "
                "command makes it again"
            )
        return piece

    def block_reports(self) -> list[dict[str, Any]]:
        """What was reported of all blocks in order; all must be calibrated."""
        return [self.store.noted(block_piece(index)) for index in range(len(self.blocks.blocks))]


#: Name of embedding and output head in codes among the pieces of a run.
ENDS = "ends"
#: Name of what a checkpoint that is tuned on has outside of its blocks and not in codes.
OUTSIDE = "outside"


def block_piece(index: int) -> str:
    """Name of a calibrated block among the pieces of a run."""
    return f"block-{index:05d}"
