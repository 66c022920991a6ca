"""AQLM checkpoints in vLLM: `vllm serve DIR` or `LLM(DIR)`, with no flag.

vLLM finds `register` through the entry point in pyproject.toml. This file decides how each layer
runs: `linear.py`, `experts.py` and `embedding.py` run them, `weights.py` checks what the
checkpoint holds, `layers.py` is what its configuration says of each layer, `product.py` in which
layout a weight stays, `versions.py` what differs between vLLM's versions.
"""

from typing import Any, Final

import torch
import vllm
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from pvrt.format.config_block import CONFIG_FILE, parse_quantization_config, skipped_modules
from pvrt.versions import require_supported_vllm
from pvrt.vllm_plugin.context import Context, DecodingNotice
from pvrt.vllm_plugin.layers import Layers
from pvrt.vllm_plugin.linear import AQLMLinearMethod
from pvrt.vllm_plugin.parent import end_with_parent
from pvrt.vllm_plugin.versions import (
    building,
    checkpoint_shapes,
    give_embeddings,
    is_routed_experts,
)


def register() -> None:
    """Make quant_method "aqlm" known to vLLM; harmless when repeated, in any of its processes."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    end_with_parent()
    register_quantization_config("aqlm")(AQLMConfig)


class AQLMConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not typed
    """The `quantization_config` of an AQLM checkpoint: what it says of each layer.

    vLLM itself changes four things after it was made, each before it asks for a layer's method:
    names in `layers` for a model that renames its modules, `packed_modules_mapping` to what the
    model fuses, `model` to the checkpoint's folder or repository, and which embeddings are in codes
    to what its files hold.
    """

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers: Final = layers
        self.model = ""
        self._notice: Final = DecodingNotice()
        self._drafts: Final[dict[str, QuantizationConfig | None]] = {}

    def __repr__(self) -> str:
        return f"AQLMConfig({self.layers})"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What a worker process of vLLM gets, which does not call `from_config`."""
        self.__dict__.update(state)
        give_embeddings(_config_of_this_build)

    @classmethod
    def get_name(cls) -> str:
        """The quant_method of config.json."""
        return "aqlm"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """float32 is for CPUs and tests; published checkpoints are float16."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Turing: CUDA 13, which vLLM is built with, knows nothing older."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the configuration is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AQLMConfig":
        """Read the `quantization_config` block of config.json.

        Raises CheckpointError when it is malformed, ServeError outside of the supported versions
        of vLLM. (Not already in `register`: an error there would stop vLLM for every other model.)
        """
        require_supported_vllm(vllm.__version__)
        give_embeddings(_config_of_this_build)
        schemes = parse_quantization_config(config, CONFIG_FILE)
        return cls(Layers(schemes, skipped_modules(config)))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Look in the files of a model whether they hold embeddings or lm_head in codes."""
        self.model = model_name
        configs = (hf_config, getattr(hf_config, "text_config", None))
        tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
        self.layers.read_ends(checkpoint_shapes(model_name, revision), tied)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Follow a model that renames its modules."""
        self.layers.rename(hf_to_vllm_mapper)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How to run a layer; None leaves it to vLLM.

        Raises ValueError (vLLM's) for a fused layer of which only some source layers are dense.
        """
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        built = building()
        if built is not None and self._builds_another(built.model):
            # vLLM builds some draft models with the configuration of their target.
            own = self.of_draft(built.model)
            if own is None:
                return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
            own.packed_modules_mapping = self.packed_modules_mapping
            method: QuantizeMethodBase | None = own.get_quant_method(layer, prefix)
            return method
        self.layers.prefix = built.prefix if built is not None else ""
        context = Context(self.layers, self.packed_modules_mapping, self._notice)
        if isinstance(layer, LinearBase):
            dense = self.layers.keeps_dense(prefix, self.packed_modules_mapping)
            return UnquantizedLinearMethod() if dense else AQLMLinearMethod(context)
        if is_routed_experts(layer):
            if self.layers.keeps_experts_dense(prefix, self.packed_modules_mapping):
                return None
            from pvrt.vllm_plugin.experts import AQLMExpertsMethod

            return AQLMExpertsMethod(context, layer.moe_config)
        return _embedding_method(context, layer, prefix)

    def of_draft(self, model: Any) -> QuantizationConfig | None:
        """The quantisation of another checkpoint (its vllm.config.ModelConfig); None for none."""
        if model.model not in self._drafts:
            self._drafts[model.model] = _read_config(model)
        return self._drafts[model.model]

    def _builds_another(self, model: Any) -> bool:
        return bool(self.model) and model.model != self.model


def _embedding_method(context: Context, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    from pvrt.vllm_plugin.embedding import AQLMEmbeddingMethod

    if not isinstance(layer, VocabParallelEmbedding):
        return None
    shape = layer.org_vocab_size, layer.embedding_dim
    end = context.layers.end(prefix, isinstance(layer, ParallelLMHead), shape)
    return None if end is None else AQLMEmbeddingMethod(context, end)


def _read_config(model: Any) -> QuantizationConfig | None:
    current = get_current_vllm_config_or_none()
    return VllmConfig.get_quantization_config(model, current.load_config)


def _config_of_this_build() -> QuantizationConfig | None:
    """The configuration for a layer that vLLM builds now and was handed none; None if not ours."""
    current, built = get_current_vllm_config_or_none(), building()
    theirs = current.quant_config if current is not None else None
    if isinstance(theirs, AQLMConfig):
        return theirs  # which looks itself whether it is a draft model's layer
    if built is not None and built.model.quantization == "aqlm":
        return _read_config(built.model)
    return None
