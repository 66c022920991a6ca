"""Randomness that depends on a run's seed and a step's name only, so a resumed run repeats it.

Draws happen on the CPU wherever they are few, so that they are the same on every device.
"""

import hashlib

import torch

from pvrt_tune import parallel


def seeded(seed: int, name: str) -> torch.Generator:
    """The generator of one step, on the CPU."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def branch(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator on a device, seeded by the next draw of one on the CPU, different on every rank.

    For draws as many as a layer's groups or weights, which would be slow to make on the CPU and to
    move. Their values depend on the kind of device.
    """
    seed = int(torch.randint(1 << 62, (1,), generator=generator))
    return torch.Generator(device).manual_seed(seed + parallel.rank())
