"""The device that computes: which one it is where nobody says, and what it has.

Only `default_device` knows kinds of devices by name. What else is asked of one goes through torch's
module of its kind (`torch.cuda`, say), so that a device which torch knows can at least be named.
"""

import torch

from pvrt.errors import RunError

Device = str | torch.device


def default_device() -> str:
    """A GPU of NVIDIA or AMD ("cuda") if there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def checked_device(choice: str) -> str:
    """The device that a user means by "auto" or a name. Raises RunError if it cannot be used."""
    if choice == "auto":
        return default_device()
    is_here(choice)  # refuses what is no device in our words
    try:
        torch.empty(0, device=choice)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise RunError(f"--device {choice} cannot be used: {reason}") from error
    return choice


def is_here(device: Device) -> bool:
    """Whether this machine has a device of that kind. Raises RunError for a kind that is none."""
    try:
        return bool(torch.get_device_module(device).is_available())
    except RuntimeError as error:
        raise RunError(
            f"there is no device {str(device)!r}; give auto, cpu, cuda or cuda:N"
        ) from error


def cpu_features() -> set[str]:
    """The instruction sets of this CPU, as torch calls them: avx512_vbmi, amx_bf16, sve2."""
    return {name for name, has in torch.cpu.get_capabilities().items() if has is True}


def free_device_bytes(device: Device) -> int | None:
    """Free bytes of a device's own memory; None where it has none, or torch cannot say."""
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    return None if ask is None else int(ask(device)[0])


def multiplies_bfloat16(device: Device) -> bool:
    """Whether an accelerator multiplies bfloat16 in hardware."""
    ask = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return ask is not None and bool(ask(including_emulation=False))


def release_device_memory() -> None:
    """Give memory that torch keeps for later tensors back to the device, where there is one."""
    if torch.accelerator.is_available():
        torch.get_device_module(torch.accelerator.current_accelerator()).empty_cache()
