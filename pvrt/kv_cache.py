"""The key-value cache of a model and the longest context, from its config alone."""

from dataclasses import dataclass, fields
from functools import cache
from typing import Any

#: Share of a device's memory that weights and cache may take; engines need the rest to run.
USABLE = 0.9


@cache
def cache_name() -> str:
    """What the installed transformers calls a model's cache, among its arguments and its outputs:
    `cache`, or `past_key_values` in older versions.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    known = {field.name for field in fields(CausalLMOutputWithPast)}
    return "cache" if "cache" in known else "past_key_values"


@dataclass(frozen=True)
class CacheShape:
    """The key-value cache of one sequence.

    layers: per layer, bytes per token and the most tokens kept (None: all of them).
    """

    layers: tuple[tuple[int, int | None], ...]
    longest: int

    def bytes_for(self, tokens: int) -> int:
        """Bytes of one sequence of so many tokens."""
        return sum(size * min(tokens, most or tokens) for size, most in self.layers)

    def longest_context(self, free_bytes: float) -> int:
        """Most tokens of one sequence that fit, at most what the model was made for; 0 if none."""
        low, high = 0, self.longest
        while low < high:
            middle = (low + high + 1) // 2
            if self.bytes_for(middle) <= free_bytes:
                low = middle
            else:
                high = middle - 1
        return low


def cache_shape(config: Any, itemsize: int = 2) -> CacheShape:
    """The cache of a transformers config: grouped heads, sliding windows, compressed (MLA).

    Layers of linear attention keep a state that does not grow.
    """
    text = config.get_text_config()
    count, longest = text.num_hidden_layers, _longest(text)
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:  # no attention at all
        return CacheShape(((0, None),) * count, longest)
    width = _widest_head(text) or text.hidden_size // heads
    per_token = 2 * (getattr(text, "num_key_value_heads", None) or heads) * width * itemsize
    if getattr(text, "kv_lora_rank", None):
        per_token = (text.kv_lora_rank + text.qk_rope_head_dim) * itemsize
    window = getattr(text, "sliding_window", None)
    kinds = (
        getattr(text, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"] * count
    )
    layers = tuple(
        (0 if "linear" in kind else per_token, window if "sliding" in kind else None)
        for kind in kinds
    )
    return CacheShape(layers, longest)


def _widest_head(text: Any) -> int | None:
    """The width of a head; where layers differ, transformers raises an error of its own kind when
    the config is asked, and the widest counts.
    """
    layers = getattr(text, "per_layer_config", None) or [text]
    return max((getattr(layer, "head_dim", None) or 0 for layer in layers), default=0) or None


def _longest(text: Any) -> int:
    """The longest context that a config's rotary embedding was scaled for.

    `max_position_embeddings` often stays the original's where a card says to add a rope scaling.
    """
    longest: int = getattr(text, "max_position_embeddings", None) or 1 << 20
    rope = getattr(text, "rope_parameters", None) or {}
    factor = rope.get("factor") or 1
    match rope.get("rope_type"):
        case "yarn":
            original = rope.get("original_max_position_embeddings") or longest
            return max(longest, int(original * factor))
        case "linear" | "dynamic":
            return int(longest * factor)
    return longest  # llama3 and longrope are counted in it already; so are scalings by layer type
