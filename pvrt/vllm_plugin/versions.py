"""Everything that differs between the versions of vLLM that pvrt serves on (`pvrt.versions`).

The engines of all of them were run on a CPU (docs/vllm.md): 0.30, 0.31 and 0.32 as packaged, 0.33,
which has no CPU package, with its Python files over the compiled operators of 0.32.
"""

from collections.abc import Callable, Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


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
