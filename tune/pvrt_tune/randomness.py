"""Randomness that depends on a run's seed and a step's name only, so a resumed run repeats it."""

import hashlib

import torch


def seeded(seed: int, name: str, device: str = "cpu") -> torch.Generator:
    """The generator of one step."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8]) >> 1)
