"""How the codebooks of a scheme begin and are searched."""

from pvrt.format.scheme import Scheme
from pvrt_tune.settings import FitSettings

#: Codebooks up to this size are searched codeword by codeword: two levels gain nothing below.
EXHAUSTIVE = 1024


def cells_of(scheme: Scheme) -> int:
    """Into how many cells the codebooks of a scheme are cut for searching; 1: not cut."""
    small = scheme.codebook_size <= EXHAUSTIVE
    return 1 if small else 1 << (scheme.nbits_per_codebook // 2)


def searched_together(scheme: Scheme) -> bool:
    """Whether the codes of a group are searched anew, all together; else exchanged one by one.

    Up to three codebooks the former ends lower: the errors of SmolLM2's layers by an eighth with
    two, by a quarter with three. With four, whose codebooks begin otherwise (`starts`), it ends
    higher by as much.
    """
    return scheme.num_codebooks <= 3 and cells_of(scheme) == 1


def starts(scheme: Scheme) -> list[slice]:
    """The inputs of a group that each codebook's first codewords are about; zero elsewhere.

    All of them up to 3 bits per weight, one codebook after the other. With more, the first ones
    share the inputs out among themselves, 4 bits for each, and the others follow: on normal weights
    4x8g8 then ends 1.0 dB better, 2x8g4 0.4, 5x8g8 0.8, 6x8g8 0.6 (3x8g8 0.7 worse).
    """
    g, count = scheme.in_group_size, scheme.num_codebooks
    width = max(1, scheme.nbits_per_codebook // 4)
    if g % width or count * width < g or scheme.codebook_size > EXHAUSTIVE:
        return [slice(0, g)] * count
    parts = [slice(first, first + width) for first in range(0, g, width)]
    left = count - len(parts)
    wide = g // left if left and g % left == 0 else g
    return parts + [slice(i * wide % g, i * wide % g + wide) for i in range(left)]


def codewords_scored(scheme: Scheme, settings: FitSettings) -> int:
    """Scores that one search of one codebook computes: of all codewords, or of cells and theirs."""
    cells = cells_of(scheme)
    if cells == 1:
        return scheme.codebook_size
    return cells + min(settings.probes, cells) * (scheme.codebook_size // cells)
