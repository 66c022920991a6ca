"""What an NVIDIA GPU has used of energy, as its driver's library NVML counts it."""

import ctypes
from collections.abc import Callable

import torch


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """Reads the joules that a GPU has used since its driver was loaded; None where NVML is not
    there or does not count them (before Volta, or for a part of a card).
    """
    if device.type != "cuda":
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, used = ctypes.c_void_p(), ctypes.c_ulonglong()
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()

    def read() -> float | None:
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(used)):
            return None
        return used.value / 1000

    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return None
    return None if read() is None else lambda: read() or 0.0
