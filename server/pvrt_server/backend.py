"""Which engine serves a model, in what form and how much of it: decided once, before loading.

What is printed before the start and what is then loaded both come from the `Decision`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pvrt.errors import ServeError
from pvrt.format.grid import GridCheckpoint
from pvrt.format.scheme import GridScheme, Scheme
from pvrt.kv_cache import CacheShape, cache_shape
from pvrt.versions import install_vllm
from pvrt_kernels.cpu import library
from pvrt_kernels.cpu.decoder_program import MOST_ROWS
from pvrt_server.capacity import Capacity, Machine, gigabytes, weight_bytes
from pvrt_server.opened import OpenedModel
from pvrt_server.options import ServeOptions

Backend = Literal["vllm", "local"]
# What the C program of `cpu_model` computes; other rotations depend on the length so far.
_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# Beside weights and cache, measured on SmolLM2-135M (CPU) and rounded up: Python, torch and
# activations, in vLLM's case for three processes. On a GPU: context, graphs and activations.
_LOCAL_HOST_BYTES = 700_000_000
_VLLM_HOST_BYTES = 2_500_000_000
_GPU_BYTES = 1_500_000_000


@dataclass(frozen=True)
class Decision:
    """How a model is served.

    reason completes "on this backend, because". dtype auto leaves the type to the backend.
    weights says what becomes of them: layers of the schemes in `decoded` are decoded once, at load.
    in_c says that the embedded engine decodes in C (`cpu_model`), cache_tokens how many tokens'
    keys and values it keeps for all sequences together.
    """

    backend: Backend
    reason: str
    machine: Machine
    dtype: str
    weights: str
    decoded: Sequence[Scheme | GridScheme]
    in_c: bool
    capacity: Capacity
    cache_tokens: int

    def report(self, name: str) -> str:
        """What to print before the model is loaded."""
        engine = "vLLM" if self.backend == "vllm" else "the embedded engine"
        lines = [
            f"memory      {self.machine}",
            f"weights     {gigabytes(self.capacity.weight_bytes)}, {self.weights}",
            *self.capacity.lines(),
        ]
        return "\n  ".join([f"{name} on {engine}, because {self.reason}", *lines])


def choose_backend(opened: OpenedModel, options: ServeOptions, machine: Machine) -> Decision:
    """Decide how to serve an opened model on a machine.

    Raises ServeError for options that the backend has not or that the model cannot meet, and when
    the weights alone, or a single token, are too much for the machine.
    """
    backend, reason = _backend(opened, options, machine)
    local = backend == "local"
    if local and options.extra:
        raise ServeError(
            f"the embedded engine has no option {options.extra[0]}; flags after -- are vLLM's, "
            "which --engine vllm takes"
        )
    dtype: str = options.dtype
    if local and dtype == "auto" and machine.device == "cpu":
        dtype = "float32"
    itemsize = _itemsize(opened, backend, dtype)
    decoded = _decoded(opened, backend, machine)
    in_c = (
        local
        and dtype == "float32"
        and not opened.foreign
        and runs_in_c(opened.config, machine.device)
    )
    if in_c and options.sequences > MOST_ROWS:
        raise ServeError(
            f"--max-num-seqs is {options.sequences}; this model runs at most {MOST_ROWS} "
            "sequences at once on a CPU"
        )
    on_cpu = machine.device == "cpu"
    size = weight_bytes(opened.stored, decoded, itemsize, in_c=in_c, on_cpu=on_cpu)
    cache = cache_shape(opened.config, itemsize)
    length = _wanted_length(opened, options, cache, backend)
    free = _bytes_for_cache(opened, machine, backend, size, cache)
    if options.cache_bytes is not None:
        free = options.cache_bytes
    capacity = Capacity(size, cache, free, length)
    _check_length(options, capacity)
    budget = free // 2 if options.cache_bytes is None else free
    tokens = max(capacity.max_model_len, budget // max(1, cache.bytes_for(1)))
    weights = _in_words(opened, decoded)
    return Decision(backend, reason, machine, dtype, weights, decoded, in_c, capacity, tokens)


def runs_in_c(config: Any, device: str) -> bool:
    """Whether the C program computes models of a transformers config on a device (cpu, cuda)."""
    if library.library() is None or device != "cpu":
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    sliding = getattr(config, "sliding_window", None)
    return (
        config.model_type in _MODEL_TYPES
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in _ROPE_TYPES
        and (sliding is None or config.model_type != "mistral")
        and set(layer_types) == {"full_attention"}
        and not getattr(config, "mlp_bias", False)
    )


def _backend(opened: OpenedModel, options: ServeOptions, machine: Machine) -> tuple[Backend, str]:
    """The backend and the reason for it."""
    problem = _grid_problem(opened, machine)
    match options.engine:
        case "local":
            return "local", "--engine local asks for it"
        case "vllm" if machine.vllm is None:
            raise ServeError(f"vLLM is not installed: {install_vllm()}, or use --engine local")
        case "vllm" if problem is not None:
            raise ServeError(f"{problem}; use --engine local")
        case "vllm":
            return "vllm", "--engine vllm asks for it"
    if machine.vllm is None:
        return "local", "vLLM is not installed"
    return ("vllm", "it is installed") if problem is None else ("local", problem)


def _grid_problem(opened: OpenedModel, machine: Machine) -> str | None:
    """Why vLLM cannot run a folder of scalar grids on a machine, or None.

    vLLM 0.32 has one product with grids on CPUs: 4 bits, in its build for AVX-512. On GPUs it
    chooses among many and says itself what it lacks.
    """
    if not isinstance(opened.stored, GridCheckpoint) or machine.device != "cpu":
        return None
    bits = opened.stored.scheme.bits
    if bits != 4:
        return f"vLLM runs grids of 4 bits on a CPU, and {opened.path.name} has {bits}"
    return (
        None if machine.avx512 else "vLLM runs grids on CPUs with AVX-512, which this one has not"
    )


def _itemsize(opened: OpenedModel, backend: Backend, dtype: str) -> int:
    if dtype == "auto" and backend == "local":
        dtype = opened.dtype
    return _ITEMSIZE.get(dtype, 2)  # vLLM computes 32-bit checkpoints in 16 bits


def _decoded(opened: OpenedModel, backend: Backend, machine: Machine) -> list[Scheme | GridScheme]:
    """The schemes that have no kernel there. On GPUs vLLM leaves codes to the reference."""

    def lacks_kernel(scheme: Scheme | GridScheme) -> bool:
        if isinstance(scheme, GridScheme):
            return backend == "local"
        decodes = backend == "local" or machine.device == "cpu"
        return decodes and not scheme.has_fast_kernel(machine.device)

    return [scheme for scheme in opened.stored.schemes if lacks_kernel(scheme)]


def _in_words(opened: OpenedModel, decoded: Sequence[Scheme | GridScheme]) -> str:
    schemes = opened.stored.schemes
    if not schemes:
        return "dense"
    if len(decoded) == len(schemes):
        return "decoded"
    return f"packed, {', '.join(map(str, decoded))} decoded" if decoded else "packed"


def _wanted_length(
    opened: OpenedModel, options: ServeOptions, cache: CacheShape, backend: Backend
) -> int:
    """The context that was asked for, or the one that the model was made for."""
    wanted = options.max_model_len
    text: Any = opened.config.get_text_config()
    if wanted is None and backend == "local" and not getattr(text, "max_position_embeddings", None):
        raise ServeError(
            f"{opened.path}/config.json has no max_position_embeddings; say --max-model-len"
        )
    if wanted is not None and wanted > cache.longest:
        raise ServeError(
            f"--max-model-len is {wanted}, but the model was made for {cache.longest} tokens; give "
            f"--max-model-len {cache.longest} or less"
        )
    return wanted or cache.longest


def _bytes_for_cache(
    opened: OpenedModel, machine: Machine, backend: Backend, size: int, cache: CacheShape
) -> int:
    """What weights of a size leave free, at least enough for one token."""
    own = _VLLM_HOST_BYTES if backend == "vllm" else _LOCAL_HOST_BYTES
    if machine.device != "cpu":
        own = machine.gpus * _GPU_BYTES
    needed = size + own + cache.bytes_for(1)
    if machine.free_bytes < needed:
        raise ServeError(
            f"{opened.path.name} needs {gigabytes(needed)} to start, {gigabytes(size)} of it for "
            f"weights; there is {machine}. Close what else uses it, or compress to fewer bits"
        )
    return machine.free_bytes - size - own


def _check_length(options: ServeOptions, capacity: Capacity) -> None:
    wanted, longest = options.max_model_len or 1, capacity.longest
    if wanted > longest:
        raise ServeError(
            f"a context of {wanted} tokens needs {gigabytes(capacity.cache.bytes_for(wanted))} of "
            f"KV cache and {gigabytes(capacity.cache_bytes)} are free. Try: --max-model-len "
            f"{max(longest, 1)}"
        )
