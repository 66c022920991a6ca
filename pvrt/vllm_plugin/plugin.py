"""AQLM checkpoints in vLLM: `vllm serve DIR` or `LLM(DIR)`, with no flag.

vLLM finds `register` through the entry point in pyproject.toml. This file decides how each layer
runs: `linear.py`, `experts.py` and `embedding.py` run them, `weights.py` checks what the
checkpoint holds, `context.py` is what they know of this configuration, `versions.py` what differs
between vLLM's versions.
"""

from typing import Any, Final

import torch
import vllm
from torch import nn
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from pvrt.errors import ServeError
from pvrt.format.config_block import CONFIG_FILE, parse_quantization_config, skipped_modules
from pvrt.format.scheme import Scheme
from pvrt.versions import require_supported_vllm
from pvrt.vllm_plugin.context import Context, DecodingNotice
from pvrt.vllm_plugin.linear import AQLMLinearMethod
from pvrt.vllm_plugin.versions import (
    checkpoint_tensors,
    is_routed_experts,
    is_skipped,
    use_loader_v2,
)

_EMBEDDINGS = {"embed_tokens", "wte", "tok_embeddings"}


def register() -> None:
    """Make quant_method "aqlm" known to vLLM; harmless when repeated, in any of its processes."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    register_quantization_config("aqlm")(AQLMConfig)


class AQLMConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not typed
    """The `quantization_config` of an AQLM checkpoint: a scheme and the names of dense modules.

    vLLM itself changes three things after it was made, each before it asks for a layer's method:
    `dense` for a model that renames its modules, `packed_modules_mapping` to what the model fuses,
    and `quantised_ends`. These are, of the layers outside of the blocks (embeddings, lm_head), the
    last parts of the names of those that the checkpoint stores in codes; no published one does.
    """

    def __init__(self, scheme: Scheme, dense: list[str]) -> None:
        super().__init__()
        self.scheme: Final = scheme
        self.dense = dense
        self.quantised_ends: set[str] = set()
        self._notice: Final = DecodingNotice()

    def __repr__(self) -> str:
        return f"AQLMConfig({self.scheme})"

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
        use_loader_v2(AQLMLinearMethod)
        schemes = parse_quantization_config(config, CONFIG_FILE)
        if schemes.default is None:
            raise ServeError("vLLM cannot run layers of different schemes yet")
        return cls(schemes.default, skipped_modules(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Look in the files of a model whether they hold embeddings or lm_head in codes."""
        names = checkpoint_tensors(model_name, revision)
        layers = {name.removesuffix(".codes") for name in names if name.endswith(".codes")}
        ends = {name.rpartition(".")[2] for name in layers if ".layers." not in name}
        if ends & _EMBEDDINGS and getattr(hf_config, "tie_word_embeddings", False):
            ends.add("lm_head")  # takes over what the embeddings hold
        self.quantised_ends = ends

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Follow a model that renames its modules."""
        self.dense = hf_to_vllm_mapper.apply_list(self.dense)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How to run a layer; None leaves it to vLLM.

        Raises ValueError (vLLM's) for a fused layer of which only some source layers are dense.
        """
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        if isinstance(layer, LinearBase):
            dense = self._keeps_dense(prefix)
            return UnquantizedLinearMethod() if dense else AQLMLinearMethod(self._context())
        if is_routed_experts(layer) and not self._keeps_dense(prefix):
            from pvrt.vllm_plugin.experts import AQLMExpertsMethod

            return AQLMExpertsMethod(self._context(), layer.moe_config)
        return self._embedding_method(layer) if self.quantised_ends else None

    def _context(self) -> Context:
        return Context(self.scheme, self.packed_modules_mapping, self._notice)

    def _embedding_method(self, layer: nn.Module) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        from pvrt.vllm_plugin.embedding import AQLMEmbeddingMethod

        # Models do not tell embeddings their names.
        if isinstance(layer, ParallelLMHead):
            quantised = "lm_head" in self.quantised_ends
        else:
            is_embedding = isinstance(layer, VocabParallelEmbedding)
            quantised = is_embedding and bool(self.quantised_ends & _EMBEDDINGS)
        return AQLMEmbeddingMethod(self._context()) if quantised else None

    def _keeps_dense(self, prefix: str) -> bool:
        if any(prefix.startswith(f"{name}.") for name in self.dense):  # a whole vision tower, say
            return True
        return is_skipped(prefix, self.dense, self.packed_modules_mapping)
