"""Bits of the whole file: what is fixed, and what the units may take.

A file is its tensors and its headers, of which safetensors says the size: 8 bytes and a JSON text
with an entry per tensor. Offsets in it have as many digits as they can have, so that the file is
never larger than is said here, and smaller by a few bytes per tensor.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from pvrt.errors import RunError
from pvrt.format.aqlm import PARTS
from pvrt.format.scheme import Scheme
from pvrt.format.write import WriteOptions
from pvrt_tune.allocate.knapsack import Option, choose
from pvrt_tune.allocate.units import Unit

# Its length, "__metadata__", and padding.
_SHARD_HEADER = 8 + 48 + 8
# Names in files may have a prefix that the model's have not.
_PREFIX = 8


@dataclass(frozen=True)
class FileBudget:
    """Of a model: its weights (tied ones once), bits of what is stored whatever the units get, and
    of a number that is stored as it is.
    """

    weights: int
    fixed_bits: int
    float_bits: int

    @classmethod
    def of(cls, model: Any, units: Sequence[Unit]) -> "FileBudget":
        """The budget of a skeleton with these units."""
        tied = set(model.all_tied_weights_keys)
        stored = {key: t for key, t in model.state_dict().items() if key not in tied}
        coded = {f"{name}.weight" for unit in units for name in unit.names}
        dense = {key: t for key, t in stored.items() if key not in coded}
        size = sum(t.numel() * t.element_size() for t in dense.values())
        most = sum(t.numel() * t.element_size() for t in stored.values())
        entries = sum(_entry(key, tuple(t.shape), most) for key, t in dense.items())
        shards = 1 + most // (WriteOptions().max_shard_bytes // 2)
        parameters = sum(t.numel() for t in stored.values())
        fixed = 8 * (size + entries + _SHARD_HEADER * shards)
        return cls(parameters, fixed, 8 * model.dtype.itemsize)

    def unit_bits(self, unit: Unit, scheme: Scheme) -> int:
        """Bits of a unit's tensors in a scheme and of their entries in the header."""
        parts = PARTS if unit.block is not None else (*PARTS, "in_scales")
        largest = self.fixed_bits + 8 * self.weights
        header = sum(
            _entry(f"{name}.{part}", scheme.part_shape(part, *shape), largest)
            for name, shape in zip(unit.names, unit.shapes, strict=True)
            for part in parts
        )
        return unit.bits(scheme, self.float_bits) + 8 * header

    def file_bits(self, schemes: Mapping[str, Scheme], units: Sequence[Unit]) -> int:
        """Bits of the file when every unit has the scheme of its first name."""
        return self.fixed_bits + sum(self.unit_bits(unit, schemes[unit.key]) for unit in units)

    def allocate(
        self, units: Sequence[Unit], costs: Sequence[Mapping[Scheme, float]], bits: float
    ) -> list[Scheme]:
        """The scheme of every unit: least summed cost in a file of at most `bits` per weight.

        Raises RunError when the least or the most that the schemes take is another number of bits.
        """
        items = [
            [Option(self.unit_bits(unit, scheme), cost[scheme]) for scheme in unit.schemes]
            for unit, cost in zip(units, costs, strict=True)
        ]
        left = int(bits * self.weights) - self.fixed_bits
        least, most = (sum(pick(part).bits for part in items) for pick in (min, max))
        if not least <= left <= most:
            low, high = (1000 * (self.fixed_bits + size) / self.weights for size in (least, most))
            raise RunError(
                f"--bits {bits:g} is out of reach: with all layers in the smallest scheme this "
                f"model's file has {ceil(low) / 1000} bits per weight, in the largest "
                f"{int(high) / 1000}; give a number between them"
            )
        chosen = choose(items, left)
        return [unit.schemes[index] for unit, index in zip(units, chosen, strict=True)]


def _entry(name: str, shape: Sequence[int], largest: int) -> int:
    """Bytes of a tensor's entry in a header, at most."""
    described = {"dtype": "BF16", "shape": list(shape), "data_offsets": [largest, largest]}
    return len(json.dumps({name: described}, separators=(",", ":"))) + _PREFIX
