"""What PV-Tuning asks of a CPU besides products and searches (nearest.py): choice among codes,
gradients of codebooks and scales, and the step of a latent weight, in C.

They are small beside a step of training when they are compiled, and a third of it when they are
not: see pv_step.c. Callers ask `can_...` first and do it in torch elsewhere.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from pvrt_kernels.cpu import layouts, library, products

_VOID = ctypes.c_void_p
_LONG = ctypes.c_int64
# Groups of one part of a latent's step: what it reads stays in a core's own cache.
_PART = 512


class _Choice(ctypes.Structure):
    """`choice` of cpu.h."""

    _fields_ = [
        *((name, _VOID) for name in ("wanted", "entries", "draws", "present", "found")),
        *((name, _VOID) for name in ("codes", "moves", "sums", "margins")),
        *((name, _LONG) for name in ("books", "size", "group")),
    ]


class _LatentStep(ctypes.Structure):
    """`latent_step` of cpu.h."""

    _fields_ = [
        *((name, _VOID) for name in ("grad", "decoded", "moment", "latent", "distance", "sums")),
        *((name, ctypes.c_float) for name in ("beta", "rate")),
        *((name, _LONG) for name in ("group", "groups", "part_groups")),
    ]


def choose(
    wanted: Tensor, present: Tensor, found: Tensor, books: Tensor, draws: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The nearest to values wanted [n, g] of the sums with codes `present` [n, M] and of two found
    others [n, 2, M].

    books [M, K, g] fp32, codes int64. Returns codes [n, M] int64, their sums [n, g], whether they
    differ from the present ones [n], and by how much less the value is away from that sum than from
    the next, halved [n]. A sum that is no nearer than the present one is never taken. With draws
    [n] from [0, 1) the next sum is taken with the chance that makes rounding unbiased along the
    line between the two, and the last result is 0 where it is taken.
    """
    number, size, group = books.shape
    count = len(wanted)
    named = {
        "wanted": wanted.contiguous(),
        "entries": books.contiguous(),
        "present": present.to(torch.uint8).contiguous(),
        "found": found.to(torch.uint8).contiguous(),
        "codes": torch.empty(count, number, dtype=torch.uint8),
        "moves": torch.empty(count, dtype=torch.bool),
        "sums": torch.empty(count, group),
        "margins": torch.empty(count),
    }
    if draws is not None:
        named["draws"] = draws.contiguous()
    pointers = {name: tensor.data_ptr() for name, tensor in named.items()}
    choice = _Choice(**pointers, books=number, size=size, group=group)
    library.library().pvrt_choose_codes(ctypes.byref(choice), count, torch.get_num_threads())
    return named["codes"].long(), named["sums"], named["moves"], named["margins"]


def can_gather(grad: Tensor, codes: Tensor, codebooks: Tensor) -> bool:
    """Whether `parameter_gradients` takes these."""
    return (
        grad.device.type == "cpu"
        and codebooks.dtype == torch.float32
        and products.can_decode(codes, codebooks.unsqueeze(0))
    )


def parameter_gradients(
    grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """dL/dW [rows, in] -> dL/dcodebooks [M, K, 1, g] and dL/dscales, shaped like scales; fp32.

    codes [rows, in/g, M] int8 or int16. Sums over rows depend on the number of threads alone.
    """
    threads = torch.get_num_threads()
    grad, books = grad.float().contiguous(), torch.zeros(threads, *codebooks.shape)
    row_scales = torch.empty(len(codes))
    # Names keep alive what the C view points to.
    kept = codes.contiguous(), codebooks.unsqueeze(0).contiguous(), scales.float().contiguous()
    rows = torch.tensor([len(codes)])
    weight = layouts.plain_weight(*kept, rows, grad.shape[1])
    library.library().pvrt_parameter_gradients(
        ctypes.byref(weight), grad.data_ptr(), books.data_ptr(), row_scales.data_ptr(), threads
    )
    return books.sum(0), row_scales.view(scales.shape)


def can_step(*tensors: Tensor) -> bool:
    """Whether `latent_step` takes these, all of one shape."""
    return library.library() is not None and all(
        t.device.type == "cpu"
        and t.dtype == torch.float32
        and t.is_contiguous()
        and t.numel() % 8 == 0
        for t in tensors
    )


def latent_step(
    latent: Tensor,
    grad: Tensor,
    moment: Tensor,
    decoded: Tensor,
    group: int,
    beta: float,
    rate: Callable[[Tensor], float],
) -> Tensor:
    """latent -= rate * grad / root of the moment, which first takes grad in; all [rows, in] fp32.

    rate: from the sums of squares (fp64 [2]) of the latent and of the step at rate 1. Returns the
    distance of every `group` elements from the decoded ones, [rows * in / group].
    """
    groups = latent.numel() // group
    distance = torch.empty(groups)
    sums = torch.empty(-(-groups // _PART), 2, dtype=torch.float64)
    named = {"grad": grad, "decoded": decoded, "moment": moment, "latent": latent}
    named |= {"distance": distance, "sums": sums}
    pointers = {name: tensor.data_ptr() for name, tensor in named.items()}
    step = _LatentStep(**pointers, beta=beta, group=group, groups=groups, part_groups=_PART)
    threads = torch.get_num_threads()
    library.library().pvrt_latent_moment(ctypes.byref(step), threads)
    step.rate = rate(sums.sum(0))
    library.library().pvrt_latent_step(ctypes.byref(step), threads)
    return distance
