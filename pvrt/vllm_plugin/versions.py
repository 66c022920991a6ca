"""Which vLLM pvrt serves on, and everything that differs between those versions.

The engines of all of them were run on a CPU (docs/vllm.md): 0.30, 0.31 and 0.32 as packaged, 0.33,
which has no CPU package, with its Python files over the compiled operators of 0.32.
"""

import os
import re
from collections.abc import Callable, Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any

from pvrt.errors import ServeError

if TYPE_CHECKING:
    from torch import Tensor, nn

OLDEST_VLLM = (0, 30)
NEWEST_VLLM = (0, 33)
ANY_VLLM = "PVRT_ANY_VLLM"  # set to 1 to try a version that is newer than the newest tested


def require_supported_vllm(version: str) -> None:
    """Raise ServeError outside of the tested range. Builds without a version number pass."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers <= (0, 1):  # 0.1.dev is what a build from a shallow clone calls itself
        return
    oldest, newest, after = (
        ".".join(map(str, bound))
        for bound in (OLDEST_VLLM, NEWEST_VLLM, (NEWEST_VLLM[0], NEWEST_VLLM[1] + 1))
    )
    supported = f"pvrt serves AQLM checkpoints on vLLM {oldest} to {newest}, found {version}"
    if numbers < OLDEST_VLLM:
        raise ServeError(f"{supported}; try pip install 'vllm>={oldest},<{after}'")
    if numbers > NEWEST_VLLM and os.environ.get(ANY_VLLM) != "1":
        raise ServeError(
            f"{supported}; try pip install -U pvrt, pip install 'vllm<{after}', or {ANY_VLLM}=1 to "
            "run untested"
        )


def use_loader_v2(method: type) -> None:
    """Give layers of a linear method the loaders that know parameter classes; repeatable.

    vLLM keeps the names of such methods in a list; nothing else selects them.
    """
    from vllm.model_executor.layers import linear

    if method.__name__ not in linear.WEIGHT_LOADER_V2_SUPPORTED:
        linear.register_weight_loader_v2_supported_method(method)


def is_skipped(prefix: str, dense: list[str], fused: dict[str, list[str]]) -> bool:
    """Whether a list of dense modules names a layer, or all source layers of a fused one.

    Raises ValueError (vLLM's) where only some of them are named.
    """
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    return bool(is_layer_skipped(prefix, dense, fused))  # the fourth argument was renamed in 0.28


def is_routed_experts(layer: "nn.Module") -> bool:
    """Whether a layer holds the experts of a mixture; by name, since importing it costs seconds."""
    return any(base.__name__ == "RoutedExperts" for base in type(layer).__mro__)


def load_experts_with(
    layer: Any, load: Callable[[Any, Iterable[tuple[str, "Tensor"]]], Iterable[str]]
) -> None:
    """Let a function load all tensors of a RoutedExperts, instead of vLLM's own.

    Until 0.31 vLLM takes every three-dimensional tensor, codes among them, for all experts in one.
    """
    layer.load_weights = MethodType(load, layer)


def checkpoint_tensors(model: str, revision: str | None) -> set[str]:
    """Names of all tensors of a model folder or repository; empty where they cannot be read."""
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    return set(get_safetensors_params_metadata(model, revision=revision))
