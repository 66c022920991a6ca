"""Sizes of a model that memory and time of a run depend on.

Each stage states its peak from them, beside its own code (`peak_bytes` and the like: of what it
allocates itself, on the device where it computes); `plan/` adds them up.
"""

from dataclasses import dataclass
from math import prod

from pvrt.format.scheme import Scheme


@dataclass(frozen=True)
class BlockShape:
    """What memory and time of one block depend on.

    parameters: of the dense block. linears: (out, in) of every layer to quantise. inputs: widths of
    the distinct inputs that they read. read, written, active: widths read and written and weights
    used by one token, which passes only some of a block's experts. widest: summed outputs of the
    widest group of sibling layers without its last. norms: summed sizes of one-dimensional weights.
    codes, floats: of the quantised block, bytes of codes and floating numbers (codebooks, scales,
    and all that stays dense). groups: of weights that share codes. on_grids: weights on grids.
    """

    parameters: int
    linears: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]
    read: float
    written: float
    active: float
    widest: int
    norms: int
    codes: int
    floats: int
    groups: int
    on_grids: int

    @property
    def moments(self) -> int:
        """Bytes of all input second moments."""
        return 4 * sum(width**2 for width in self.inputs)

    @property
    def weights(self) -> int:
        """Weights to quantise."""
        return sum(out * inputs for out, inputs in self.linears)

    @property
    def largest(self) -> int:
        """Weights of the largest layer."""
        return max(out * inputs for out, inputs in self.linears)

    @property
    def kept(self) -> float:
        """Numbers that a forward pass leaves per token for the backward pass."""
        return self.read + self.written + 1.4 * self.widest + 2 * self.norms

    def stored(self, itemsize: int) -> int:
        """Bytes of the quantised block's tensors, with floating numbers of `itemsize`."""
        return self.codes + itemsize * self.floats


@dataclass(frozen=True)
class TableShape:
    """An embedding or output head [rows, width] in codes of a scheme."""

    rows: int
    width: int
    scheme: Scheme

    @property
    def weights(self) -> int:
        """Weights of the table."""
        return self.rows * self.width

    @property
    def codes(self) -> int:
        """Bytes of its codes."""
        scheme = self.scheme
        return prod(scheme.codes_shape(self.rows, self.width)) * scheme.code_dtype.itemsize

    @property
    def floats(self) -> int:
        """Floating numbers: codebooks, a scale for every row and every column."""
        return prod(self.scheme.codebooks_shape) + self.rows + self.width

    def stored(self, itemsize: int) -> int:
        """Bytes of its tensors, with floating numbers of `itemsize`."""
        return self.codes + itemsize * self.floats


@dataclass(frozen=True)
class ModelShape:
    """What memory and time of a whole model depend on.

    outside: numbers outside the blocks, tied ones once; first: those of them that come before the
    blocks. ends: of those, embedding and output head that go into codes, the head last.
    itemsize: bytes of a number of the original.
    """

    blocks: tuple[BlockShape, ...]
    outside: int
    first: int
    vocabulary: int
    width: int
    itemsize: int
    ends: tuple[TableShape, ...] = ()

    @property
    def parameters(self) -> int:
        """Numbers of the original model."""
        return self.outside + sum(block.parameters for block in self.blocks)

    @property
    def dense(self) -> int:
        """Numbers outside the blocks that stay as they are."""
        return self.outside - sum(table.weights for table in self.ends)

    @property
    def stored(self) -> int:
        """Bytes of all quantised blocks and of tables in codes, in the original's type."""
        return sum(part.stored(self.itemsize) for part in self._quantised)

    def trained(self, *, embeddings: bool) -> int:
        """Continuous numbers that PV-Tuning moves, with dense embeddings or without."""
        return sum(part.floats for part in self._quantised) + self.dense * embeddings

    @property
    def _quantised(self) -> tuple[BlockShape | TableShape, ...]:
        return (*self.blocks, *self.ends)
