"""The instruction set that a user names, checked before a command begins."""

import os

from pvrt.errors import PvrtError


def check_choice() -> None:
    """Raise PvrtError where PVRT_CPU_ISA names kernels that this CPU or library does not have."""
    if not os.environ.get("PVRT_CPU_ISA"):
        return
    from pvrt_kernels.cpu import library  # loads torch

    try:
        library.library()
    except (OSError, ValueError) as error:
        raise PvrtError(str(error)) from error
