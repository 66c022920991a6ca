"""Schemes of additive codebooks, and all arithmetic on their shapes and bits.

"2x8g8" is 2 codebooks of 8-bit codes over groups of 8 input weights. The optional suffix "o4"
makes groups span 4 output rows (no published checkpoint does).
"""

import re
from dataclasses import dataclass

import torch

from pvrt_kernels import has_fast_kernel

_PATTERN = re.compile(r"(\d+)x(\d+)g(\d+)(?:o(\d+))?")


@dataclass(frozen=True)
class Scheme:
    """A quantisation scheme (arXiv 2401.06118, section 3). Raises ValueError when impossible."""

    num_codebooks: int
    nbits_per_codebook: int
    in_group_size: int
    out_group_size: int = 1

    def __post_init__(self) -> None:
        limits = {
            "num_codebooks": (self.num_codebooks, 1, 64),
            "nbits_per_codebook": (self.nbits_per_codebook, 1, 16),
            "in_group_size": (self.in_group_size, 1, 1024),
            "out_group_size": (self.out_group_size, 1, 1024),
        }
        for name, (value, low, high) in limits.items():
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Parse "2x8g8". Raises ValueError with an example when the text is malformed."""
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"{text!r} is not a scheme; write codebooks x bits g group, for example 2x8g8"
            )
        return cls(*(int(part) for part in match.groups() if part is not None))

    def __str__(self) -> str:
        suffix = "" if self.out_group_size == 1 else f"o{self.out_group_size}"
        return f"{self.num_codebooks}x{self.nbits_per_codebook}g{self.in_group_size}{suffix}"

    @property
    def codebook_size(self) -> int:
        """Codewords per codebook, 2^B."""
        return 1 << self.nbits_per_codebook

    @property
    def code_bits(self) -> float:
        """Bits of the codes of a weight, without codebooks and scales."""
        weights = self.in_group_size * self.out_group_size
        return self.num_codebooks * self.nbits_per_codebook / weights

    @property
    def code_dtype(self) -> torch.dtype:
        """Type of codes on disk: two's-complement wrap of an unsigned index."""
        return torch.int8 if self.nbits_per_codebook <= 8 else torch.int16

    def has_fast_kernel(self, device_type: str) -> bool:
        """Whether a device decodes this scheme faster than by the reference; see `dispatch`."""
        return has_fast_kernel(
            device_type,
            self.num_codebooks,
            self.nbits_per_codebook,
            self.in_group_size,
            self.out_group_size,
        )

    def divides(self, out_features: int, in_features: int) -> bool:
        """Whether a linear layer of this shape can be quantised."""
        return out_features % self.out_group_size == 0 and in_features % self.in_group_size == 0

    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """Shape of `codes`; the layer must satisfy `divides`."""
        return (
            out_features // self.out_group_size,
            in_features // self.in_group_size,
            self.num_codebooks,
        )

    @property
    def codebooks_shape(self) -> tuple[int, int, int, int]:
        """Shape of `codebooks` (one set per linear layer)."""
        return (self.num_codebooks, self.codebook_size, self.out_group_size, self.in_group_size)

    def scales_shape(self, out_features: int) -> tuple[int, int, int, int]:
        """Shape of `scales`: one per group of output rows."""
        return (out_features // self.out_group_size, 1, 1, 1)

    def part_shape(self, part: str, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of one tensor of a layer in a checkpoint, by the last word of its name."""
        shapes: dict[str, tuple[int, ...]] = {
            "codes": self.codes_shape(out_features, in_features),
            "codebooks": self.codebooks_shape,
            "scales": self.scales_shape(out_features),
            "bias": (out_features,),
            "in_scales": (in_features,),
        }
        return shapes[part]

    def layer_bits(self, out_features: int, in_features: int, float_bits: int = 16) -> int:
        """Bits of one quantised layer, codebooks and scales included, bias not.

        Codes count B bits each, as the paper does (AQLM eq. 10 with its factor M); a scheme with
        B other than 8 or 16 takes more on disk.
        """
        rows, groups, codebooks = self.codes_shape(out_features, in_features)
        codes = rows * groups * codebooks * self.nbits_per_codebook
        floats = codebooks * self.codebook_size * self.out_group_size * self.in_group_size
        return codes + (floats + rows) * float_bits

    def bits_per_weight(self, out_features: int, in_features: int, float_bits: int = 16) -> float:
        """True bits per weight of one layer, codebooks and scales included."""
        return self.layer_bits(out_features, in_features, float_bits) / (out_features * in_features)


_GRID_PATTERN = re.compile(r"w(\d+)g(\d+)(s?)")


@dataclass(frozen=True)
class GridScheme:
    """A scalar grid, w ~ s (q - z): one scale s and zero z per row and group of inputs.

    "w4g128" has codes q of 4 bits and groups of 128; in the symmetric "w4g128s" z is 2^(bits-1)
    everywhere and is not stored. Raises ValueError when impossible.
    """

    bits: int
    group_size: int
    symmetric: bool = False

    def __post_init__(self) -> None:
        limits = {"bits": (self.bits, 2, 8), "group_size": (self.group_size, 8, 4096)}
        for name, (value, low, high) in limits.items():
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")

    @classmethod
    def parse(cls, text: str) -> "GridScheme":
        """Parse "w4g128" or "w4g128s". Raises ValueError when the text is malformed."""
        match = _GRID_PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not a grid; write w bits g group, for example w4g128")
        return cls(int(match[1]), int(match[2]), bool(match[3]))

    def __str__(self) -> str:
        return f"w{self.bits}g{self.group_size}{'s' if self.symmetric else ''}"

    @property
    def in_group_size(self) -> int:
        """Inputs that share a scale."""
        return self.group_size

    @property
    def levels(self) -> int:
        """The largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def codes_per_word(self) -> int:
        """Codes in an int32 of the packed layout; what is left of its bits is empty."""
        return 32 // self.bits

    def divides(self, out_features: int, in_features: int) -> bool:
        """Whether a linear layer of this shape can be quantised."""
        return in_features % self.group_size == 0

    def scales_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of scales and zeros."""
        return (out_features, in_features // self.group_size)

    def packed_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the int32 words that hold the codes, packed along the inputs."""
        return (out_features, -(-in_features // self.codes_per_word))

    def packed_zeros_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the int32 words that hold the zeros, packed along the outputs."""
        rows, groups = self.scales_shape(out_features, in_features)
        return (-(-rows // self.codes_per_word), groups)

    def layer_bits(self, out_features: int, in_features: int, float_bits: int = 16) -> int:
        """Bits of one layer, scales and zeros included, bias and empty bits of words not."""
        rows, groups = self.scales_shape(out_features, in_features)
        zero_bits = 0 if self.symmetric else self.bits
        return out_features * in_features * self.bits + rows * groups * (float_bits + zero_bits)

    def bits_per_weight(self, out_features: int, in_features: int, float_bits: int = 16) -> float:
        """True bits per weight of one layer, scales and zeros included."""
        return self.layer_bits(out_features, in_features, float_bits) / (out_features * in_features)


def parse_scheme(text: str) -> Scheme | GridScheme:
    """Parse additive codebooks ("2x8g8") or a scalar grid ("w4g128", symmetric "w4g128s").

    Raises ValueError with an example of both when the text is neither.
    """
    kinds: tuple[tuple[re.Pattern[str], type[Scheme] | type[GridScheme]], ...] = (
        (_PATTERN, Scheme),
        (_GRID_PATTERN, GridScheme),
    )
    for pattern, kind in kinds:
        if pattern.fullmatch(text.strip()):
            return kind.parse(text)
    raise ValueError(
        f"{text!r} is not a scheme; write codebooks x bits g group (2x8g8), or for a scalar grid "
        "w bits g group (w4g128; symmetric: w4g128s)"
    )
