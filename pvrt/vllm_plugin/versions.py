"""Everything that differs between the versions of vLLM that pvrt serves on (`pvrt.versions`).

And all that reaches into vLLM where it has no hook. The engines of all of them were run on a CPU
(docs/vllm.md): 0.30, 0.31 and 0.32 as packaged, 0.33, which has no CPU package, with its Python
files over the compiled operators of 0.32.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn


class Building(NamedTuple):
    """The model that vLLM is building: its vllm.config.ModelConfig, and how layer names begin."""

    model: Any
    prefix: str


def building() -> Building | None:
    """The model that vLLM is building now, not one inside of it; None outside of that.

    vLLM keeps the configuration of a target model while it builds the draft model; what tells them
    apart is known only to the function that builds them, on this thread's stack.
    """
    found, frame = None, inspect.currentframe()
    while isinstance(frame, FrameType):
        if frame.f_code.co_name == "initialize_model" and "model_config" in frame.f_locals:
            found = Building(frame.f_locals["model_config"], frame.f_locals.get("prefix") or "")
        frame = frame.f_back
    return found


def give_embeddings(config: Callable[[], Any]) -> None:
    """Let embeddings and heads ask for a quantisation that their model does not hand them.

    86 of 131 models (0.32) build these layers without a word of it. `config()` is asked while such
    a layer is built, and answers None for models that are not ours. Repeatable.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    original = VocabParallelEmbedding.__init__
    if hasattr(original, "aqlm_gives"):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(*args: Any, **keywords: Any) -> None:
        given = signature.bind(*args, **keywords)
        if not (given.arguments.get("quant_config") or given.arguments.get("quant_method")):
            given.arguments["quant_config"] = config()
        original(*given.args, **given.kwargs)

    init.aqlm_gives = True  # type: ignore[attr-defined]
    VocabParallelEmbedding.__init__ = init


def is_skipped(prefix: str, dense: list[str], fused: Mapping[str, Sequence[str]]) -> bool:
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


def load_experts_of_gpt_oss() -> None:
    """Let gpt-oss load experts that are apart: its own code knows fused ones only. Repeatable.

    Each goes to the `load_weights` of its layer (`load_experts_with`).
    """
    from vllm.model_executor.models.gpt_oss import GptOssModel

    original = GptOssModel.load_weights
    if hasattr(original, "aqlm_gives"):
        return

    @functools.wraps(original)
    def load_weights(self: Any, weights: Iterable[tuple[str, "Tensor"]]) -> set[str]:
        layers = {
            f"{name.partition('.experts')[0]}.experts": (name, module)
            for name, module in self.named_modules()
            if hasattr(module, "aqlm_load")
        }
        loaded: set[str] = set()

        def others() -> Iterator[tuple[str, "Tensor"]]:
            for name, tensor in weights:
                before, _, rest = name.partition(".experts.")
                if f"{before}.experts" in layers and rest[:1].isdigit():
                    path, module = layers[f"{before}.experts"]
                    loaded.update(f"{path}.{own}" for own in module.load_weights([(rest, tensor)]))
                else:  # its mapper renames dense embeddings alone
                    yield name.replace("embed_tokens.", "embedding."), tensor

        found: set[str] = original(self, others())
        return found | loaded

    load_weights.aqlm_gives = True  # type: ignore[attr-defined]
    GptOssModel.load_weights = load_weights


def checkpoint_shapes(model: str, revision: str | None) -> dict[str, list[int]]:
    """Shapes of all tensors of a folder or repository by name; empty where they cannot be read."""
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    metadata = get_safetensors_params_metadata(model, revision=revision)
    metadata.pop("__metadata__", None)  # of a file, among its tensors
    return {name: list(tensor["shape"]) for name, tensor in metadata.items()}


def holds_whole_model() -> bool:
    """Whether this process holds layers of all blocks: not so in pipeline parallelism."""
    from vllm.distributed import parallel_state

    started = parallel_state.model_parallel_is_initialized()
    return not started or bool(parallel_state.get_pp_group().world_size == 1)
