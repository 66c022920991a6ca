"""Capacity: what a machine has, what a model needs there, and what is left for its cache.

Counts from headers and free memory, before anything is loaded. `backend` decides by it.
"""

import importlib.util
import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from pvrt.device import cpu_features, default_device
from pvrt.format.folder import StoredModel, TensorInfo
from pvrt.format.scheme import GridScheme, Scheme
from pvrt.kv_cache import CacheShape
from pvrt.memory import free_host_bytes
from pvrt_kernels.cpu.decoder_program import Rounded


@dataclass(frozen=True)
class Machine:
    """What there is to serve with. device is cpu, or torch's name of an accelerator.

    Bytes are all of a GPU's (of `gpus` GPUs together), or the host's. vllm is the folder of the
    installed vLLM; avx512 says that the CPU has these instructions, or is no x86 CPU.
    """

    device: str
    free_bytes: int
    total_bytes: int
    gpus: int = 1
    vllm: Path | None = None
    avx512: bool = True

    def __str__(self) -> str:
        names = "the CPU" if self.device == "cpu" else "the GPU"
        if self.gpus > 1:
            names = f"{self.gpus} GPUs"
        return f"{names}, {gigabytes(self.free_bytes)} free"


def this_machine(gpus: int = 1) -> Machine:
    """The first GPUs of this machine, or its host memory."""
    vllm, avx512, device = installed_vllm(), _has_avx512(), default_device()
    if device == "cpu":
        free = free_host_bytes()
        return Machine(device, free, free, 1, vllm, avx512)
    devices = torch.get_device_module(device)
    gpus = min(gpus, devices.device_count())
    sizes = [devices.mem_get_info(number) for number in range(gpus)]
    # Every GPU gets the same share, so the fullest decides.
    free, total = min(size[0] for size in sizes), min(size[1] for size in sizes)
    return Machine(device, gpus * free, gpus * total, gpus, vllm, avx512)


def installed_vllm() -> Path | None:
    """The folder of the installed vLLM. Importing it to ask would take seconds."""
    spec = importlib.util.find_spec("vllm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _has_avx512() -> bool:
    return platform.machine() not in ("x86_64", "AMD64") or "avx512_f" in cpu_features()


@dataclass(frozen=True)
class Capacity:
    """How a model fits on a machine. Sizes are bytes, lengths tokens.

    cache is one sequence's key-value cache, cache_bytes what all sequences may take; wanted_len is
    what was asked for, or what the model was made for.
    """

    weight_bytes: int
    cache: CacheShape
    cache_bytes: int
    wanted_len: int

    @property
    def max_model_len(self) -> int:
        """The longest sequence that will be served: what fits, at most the one wanted."""
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
            f"KV cache    {per_token / 1e3:,.1f} kB per token, {full} for {length:,} tokens",
            f"context     {context}",
            f"at once     {self.concurrency} requests of that length, more of shorter ones",
        ]


def gigabytes(size: float) -> str:
    """A size for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def weight_bytes(
    model: StoredModel,
    decoded: Collection[Scheme | GridScheme],
    itemsize: int,
    *,
    in_c: bool,
    on_cpu: bool,
) -> int:
    """What a model's weights will take in memory.

    Layers of the schemes in `decoded` are decoded once. itemsize is of the type that is computed
    in; in_c says that the embedded engine runs the model in C, which keeps what is not quantised as
    narrow as it is stored, and a dense head in int8 too.
    """
    tensors = dict(model.tensors)
    total = _rounded_bytes(model, decoded) if in_c else 0
    if in_c:
        for name in model.dense_bytes():
            if len(tensors[name].shape) == 2:
                info = tensors.pop(name)
                total += info.elements * info.float_bits // 8
    for layer in model.layers.values():
        if layer.scheme in decoded:
            total += layer.out_features * layer.in_features * itemsize
            for part in model.PARTS:
                tensors.pop(f"{layer.name}.{part}", None)
        elif on_cpu and isinstance(layer.scheme, Scheme) and layer.scheme.nbits_per_codebook <= 8:
            # Their kernel keeps codebooks as tables too, in float32.
            total += 4 * tensors[f"{layer.name}.codebooks"].elements
    return total + sum(_loaded_bytes(info, itemsize) for info in tensors.values())


def _rounded_bytes(model: StoredModel, decoded: Collection[Scheme | GridScheme]) -> int:
    """What the C program keeps beside a head that is dense; it may be the embedding."""
    for end in ("lm_head", "embed_tokens"):
        for layer in model.layers.values():
            if layer.name.endswith(end):
                coded = layer.scheme not in decoded
                return 0 if coded else Rounded.nbytes(layer.out_features, layer.in_features)
        for name, info in model.tensors.items():
            if name.endswith(f"{end}.weight") and len(info.shape) == 2:
                return Rounded.nbytes(*info.shape)
    return 0


def _loaded_bytes(info: TensorInfo, itemsize: int) -> int:
    floating = info.dtype in ("F16", "BF16", "F32", "F64")
    return info.elements * (itemsize if floating else info.float_bits // 8)
