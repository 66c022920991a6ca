"""Searches for the nearest entries of codebooks, and for sums of them, in C: see nearest.c.

Fits and PV-Tuning spend their time here. Callers ask `can_...` first and search in torch elsewhere.
"""

import ctypes

import torch
from torch import Tensor

from pvrt_kernels.cpu import library

_VOID = ctypes.c_void_p
_LONG = ctypes.c_int64
# Bounds of nearest.c.
_MOST_BOOKS, _MOST_ENTRIES, _MOST_GROUP, _MOST_KEPT = 8, 256, 64, 8


class _Sums(ctypes.Structure):
    """`sums` of cpu.h."""

    _fields_ = [
        *((name, _VOID) for name in ("tables", "norms", "products", "later", "pull")),
        *((name, _LONG) for name in ("books", "size", "group")),
    ]


class _Scores(ctypes.Structure):
    """`scores` of cpu.h."""

    _fields_ = [
        *((name, _VOID) for name in ("columns", "offsets")),
        *((name, _LONG) for name in ("length", "size")),
    ]


def can_search(books: Tensor, kept: int) -> bool:
    """Whether `nearest_sums` takes books [M, K, g] and keeps so many sums; `choose` of pv_step.py
    takes them if it may keep two.
    """
    number, size, group = books.shape
    return (
        books.device.type == "cpu"
        and number <= _MOST_BOOKS
        and group <= _MOST_GROUP
        and size <= _MOST_ENTRIES
        and size % 8 == 0
        and kept <= _MOST_KEPT
        and library.library() is not None
    )


def nearest_sums(wanted: Tensor, books: Tensor, beam: int, count: int) -> Tensor:
    """Codes [n, count, M] int64 of sums of entries near to the values wanted, nearest first.

    wanted [n, g], books [M, K, g], both fp32. A beam search over the books in order: the `beam`
    partial sums are kept that come nearest together with the means of the books to come. Distances
    closer than 2^-15 of their squares count as equal.
    """
    sums, _kept = _searchable(books)
    wanted = wanted.contiguous()
    codes = torch.empty(len(wanted), count, len(books), dtype=torch.uint8)
    library.library().pvrt_nearest_sums(
        ctypes.byref(sums),
        wanted.data_ptr(),
        len(wanted),
        beam,
        count,
        codes.data_ptr(),
        torch.get_num_threads(),
    )
    return codes.long()


def _searchable(books: Tensor) -> tuple[_Sums, list[Tensor]]:
    """Books [M, K, g] as the search reads them, and the tensors that must outlive it."""
    number, size, group = books.shape
    books = books.contiguous()
    after = torch.stack([books[m + 1 :].mean(1).sum(0) for m in range(number)])
    products = torch.empty(number, number, size, size)
    for m in range(1, number):
        products[:m, m] = 2 * books[:m] @ books[m].T
    parts = {
        "tables": books.mT.contiguous(),
        "norms": books.square().sum(2),
        "products": products,
        "later": after,
        "pull": torch.einsum("mg,ikg->mik", 2 * after, books).contiguous(),
    }
    pointers = {name: part.data_ptr() for name, part in parts.items()}
    return _Sums(**pointers, books=number, size=size, group=group), list(parts.values())


def can_score(features: Tensor, rows: Tensor) -> bool:
    """Whether `lowest_scores` takes these."""
    size = len(rows)
    return (
        features.device.type == "cpu"
        and features.dtype == rows.dtype == torch.float32
        and size <= _MOST_ENTRIES
        and size % 8 == 0
        and library.library() is not None
    )


def lowest_scores(features: Tensor, rows: Tensor, offset: Tensor) -> Tensor:
    """For every feature vector the row of the lowest score <feature, row> + offset, [n] int64.

    features [n, d], rows [K, d], offset [K], all fp32. Scores closer than 2^-15 of their size count
    as equal.
    """
    # Names keep alive what the C view points to.
    features, columns, offset = features.contiguous(), rows.T.contiguous(), offset.contiguous()
    pointers = {"columns": columns.data_ptr(), "offsets": offset.data_ptr()}
    scores = _Scores(**pointers, length=features.shape[1], size=len(rows))
    codes = torch.empty(len(features), dtype=torch.uint8)
    library.library().pvrt_lowest_scores(
        ctypes.byref(scores),
        features.data_ptr(),
        len(features),
        codes.data_ptr(),
        torch.get_num_threads(),
    )
    return codes.long()
