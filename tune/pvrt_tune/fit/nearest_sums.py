"""The codewords, one of every codebook, whose sum is nearest to a value.

On CPUs in C (pvrt_kernels/cpu/nearest.py), elsewhere in torch.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pvrt.format.scheme import Scheme
from pvrt_kernels.cpu import nearest
from pvrt_tune.fit.code_search import lowest, search_bytes, squared_distance

#: Partial sums kept from codebook to codebook.
BEAM = 8
# Values whose candidates are held at once.
_AT_ONCE = 1 << 16


def values_of(codebooks: Tensor, codes: Tensor) -> Tensor:
    """codebooks [M, K, g], codes [..., M] int64 -> [..., g]."""
    total = F.embedding(codes[..., 0], codebooks[0])
    for m in range(1, len(codebooks)):
        total += F.embedding(codes[..., m], codebooks[m])
    return total


def search_codes(wanted: Tensor, codebooks: Tensor, count: int = 1) -> Tensor:
    """Codes whose codewords, one of every codebook, add up to nearly the values wanted.

    wanted [n, g], codebooks [M, K, g] -> [n, count, M] int64, nearest first; fewer than `count`
    where there are fewer sums. A beam search: after every codebook the partial sums count that come
    nearest with the means of the later codebooks. One codebook is searched exactly. Of two with 8
    bits, fitted to a language model's weights, the nearest of all 65,536 sums is found for 99 % of
    the values; exchanging one code at a time finds one in six of the sums that lie nearer than the
    present one (values a fifth of the root mean square away from it).
    """
    if nearest.can_search(codebooks, count):
        return nearest.nearest_sums(wanted, codebooks, BEAM, count)
    return torch.cat(
        [_beam_search(part, codebooks, count) for part in torch.split(wanted, _AT_ONCE)]
    )


def _beam_search(wanted: Tensor, codebooks: Tensor, count: int) -> Tensor:
    n, g = wanted.shape
    left = wanted.unsqueeze(1)  # [n, candidates, g]
    codes = wanted.new_zeros(n, 1, 0, dtype=torch.int64)
    for m, codebook in enumerate(codebooks):
        last = m == len(codebooks) - 1
        later = codebooks[m + 1 :].mean(1).sum(0)
        aims = (left - later).reshape(-1, g)
        codewords = lowest(aims, *squared_distance(codebook), count if last else BEAM)
        candidates = left.shape[1] * codewords.shape[1]
        left = (left.reshape(-1, 1, g) - codebook[codewords]).view(n, candidates, g)
        before = codes.repeat_interleave(codewords.shape[1], 1)
        codes = torch.cat([before, codewords.reshape(n, candidates, 1)], 2)
        kept = min(count if last else BEAM, candidates)
        if not last and kept == candidates:  # all stay, in whatever order
            continue
        error = (left - later).square().sum(2)
        best = error.topk(kept, largest=False).indices.unsqueeze(2)
        left = left.gather(1, best.expand(-1, -1, g))
        codes = codes.gather(1, best.expand(-1, -1, m + 1))
    return codes


def peak_bytes(groups: int, scheme: Scheme, device: str) -> int:
    """Peak of `search_codes` for so many values, beyond its arguments."""
    size, g = scheme.codebook_size, scheme.in_group_size
    if device == "cpu" and size <= 256:  # in C: products of all codewords with each other
        return 4 * (scheme.num_codebooks * size) ** 2
    at_once = min(groups, _AT_ONCE) * (1 if scheme.num_codebooks == 1 else BEAM)
    # What is left of values, codewords, and their differences, for two candidates each.
    return search_bytes((at_once, g, size, 1), 0, device) + 4 * 2 * 3 * g * at_once
