"""What fits on this device before anything is loaded: weights, cache, context, requests at once.

Reads config.json and the headers of the weights, and asks the device for its free memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pvrt.checkpoint import Checkpoint, read_config, read_headers, weight_files
from pvrt.errors import ServeError
from pvrt.memory import free_host_bytes
from pvrt.packed import GridCheckpoint, is_quantised, open_checkpoint
from pvrt.plan import CacheShape, cache_shape
from pvrt.stored import TensorInfo
from pvrt_server import cpu_model

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# Beside weights and cache, measured on SmolLM2-135M (CPU) and rounded up: Python, torch and
# activations, in vLLM's case for three processes. On a GPU: context, graphs and activations.
_LOCAL_HOST_BYTES = 700_000_000
_VLLM_HOST_BYTES = 2_500_000_000
_GPU_BYTES = 1_500_000_000


@dataclass(frozen=True)
class Device:
    """Memory to serve from, in bytes: all of a GPU's (of `count` GPUs together), or the host's."""

    kind: str  # cpu or cuda
    free_bytes: int
    total_bytes: int
    count: int = 1

    @classmethod
    def here(cls, count: int = 1) -> "Device":
        """The first GPUs of this machine, or its host memory."""
        if not torch.cuda.is_available():
            free = free_host_bytes()
            return cls("cpu", free, free)
        count = min(count, torch.cuda.device_count())
        sizes = [torch.cuda.mem_get_info(number) for number in range(count)]
        # Every GPU gets the same share, so the fullest decides.
        free, total = min(size[0] for size in sizes), min(size[1] for size in sizes)
        return cls("cuda", count * free, count * total, count)

    def __str__(self) -> str:
        names = "the CPU" if self.kind == "cpu" else "the GPU"
        if self.count > 1:
            names = f"{self.count} GPUs"
        return f"{names}, {gigabytes(self.free_bytes)} free"


@dataclass(frozen=True)
class Fit:
    """How a model fits on a device. Sizes are bytes, lengths tokens.

    cache is one sequence's key-value cache; max_model_len the longest sequence that will be served;
    wanted_len what was asked for, or what the model was made for.
    """

    device: Device
    weight_bytes: int
    cache: CacheShape
    cache_bytes: int
    wanted_len: int

    @property
    def max_model_len(self) -> int:
        """The longest sequence that fits, at most the one wanted."""
        return min(self.wanted_len, self.longest)

    @property
    def longest(self) -> int:
        """The longest single sequence that fits."""
        return self.cache.longest_context(self.cache_bytes)

    @property
    def concurrency(self) -> int:
        """Sequences of full length that fit at once."""
        size = self.cache.bytes_for(self.max_model_len)
        return self.cache_bytes // size if size else 0

    def lines(self) -> list[str]:
        """What to print before loading."""
        length = self.max_model_len
        context = f"{length:,} tokens"
        if length < self.wanted_len:
            more = self.cache.bytes_for(self.wanted_len) - self.cache_bytes
            context += f" of {self.wanted_len:,}: all of it needs {gigabytes(more)} more"
        per_token = self.cache.bytes_for(2) - self.cache.bytes_for(1)
        full = gigabytes(self.cache.bytes_for(length))
        return [
            f"memory      {self.device}",
            f"weights     {gigabytes(self.weight_bytes)}",
            f"KV cache    {per_token / 1e3:,.1f} kB per token, {full} for {length:,} tokens",
            f"context     {context}",
            f"at once     {self.concurrency} requests of that length, more of shorter ones",
        ]


def fit(
    folder: Path,
    engine: str,
    device: Device,
    dtype: str = "auto",
    max_model_len: int | None = None,
) -> Fit:
    """How a checked model folder fits.

    engine is vllm or local; dtype and max_model_len are the user's. Raises ServeError when the
    weights alone, or a single token, are too much for the device.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    itemsize = _itemsize(read_config(folder), engine, device, dtype)
    cache = cache_shape(config, itemsize)
    weights = _weight_bytes(folder, engine, device, itemsize, config)
    own = _VLLM_HOST_BYTES if engine == "vllm" else _LOCAL_HOST_BYTES
    if device.kind == "cuda":
        own = device.count * _GPU_BYTES
    left = device.free_bytes - weights - own
    result = Fit(device, weights, cache, max(left, 0), max_model_len or cache.longest)
    if left < 0 or not result.longest:
        needed = weights + own + cache.bytes_for(1)
        raise ServeError(
            f"{folder.name} needs {gigabytes(needed)} to start, {gigabytes(weights)} of it for "
            f"weights; there is {device}. Close what else uses it, or compress to fewer bits"
        )
    return result


def gigabytes(size: float) -> str:
    """A size for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _itemsize(config: Mapping[str, Any], engine: str, device: Device, dtype: str) -> int:
    if dtype == "auto" and engine == "local":
        if device.kind == "cpu":
            return 4  # see loading.EngineOptions
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return _ITEMSIZE.get(dtype, 2)  # vLLM computes 32-bit checkpoints in 16 bits


def _weight_bytes(folder: Path, engine: str, device: Device, itemsize: int, config: Any) -> int:
    model: Checkpoint | GridCheckpoint | None = None
    if is_quantised(read_config(folder)):
        model = open_checkpoint(folder)
    tensors = dict(model.tensors if model else read_headers(weight_files(folder)))
    total = 0
    if _in_c(config, engine, device, itemsize):
        for name in model.dense_bytes() if model else list(tensors):
            if len(tensors[name].shape) == 2:  # what is not quantised stays as narrow as it is
                info = tensors.pop(name)
                total += info.elements * info.float_bits // 8
    if model is not None and _is_decoded(model, engine, device):
        for layer in model.layers.values():
            total += layer.out_features * layer.in_features * itemsize
            for part in model.PARTS:
                tensors.pop(f"{layer.name}.{part}", None)
    elif device.kind == "cpu":  # the kernels keep codebooks in two layouts
        books = [info for name, info in tensors.items() if name.endswith(".codebooks")]
        total += sum(_loaded_bytes(info, itemsize) for info in books)
    return total + sum(_loaded_bytes(info, itemsize) for info in tensors.values())


def _in_c(config: Any, engine: str, device: Device, itemsize: int) -> bool:
    """Whether the embedded engine will run the model in C."""
    kind = torch.device(device.kind)
    return engine == "local" and itemsize == 4 and cpu_model.supports(config, kind)


def _is_decoded(model: Checkpoint | GridCheckpoint, engine: str, device: Device) -> bool:
    """Whether an engine decodes the weights once and keeps them dense."""
    if isinstance(model, GridCheckpoint):
        return engine == "local"
    return not model.scheme.has_fast_kernel(device.kind)


def _loaded_bytes(info: TensorInfo, itemsize: int) -> int:
    floating = info.dtype in ("F16", "BF16", "F32", "F64")
    return info.elements * (itemsize if floating else info.float_bits // 8)
