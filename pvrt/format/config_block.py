"""The `quantization_config` block of an AQLM checkpoint: which scheme each layer has.

Published checkpoints have one scheme for all layers, in four numbers. Ours may have several, and
embeddings in codes. Then the four numbers hold a word in their place, at which every reader stops
that does not know `schemes`: {"2x8g8": [layer names], "2x8g4": ["model.embed_tokens"]}.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pvrt.errors import CheckpointError
from pvrt.format.scheme import Scheme

CONFIG_FILE = "config.json"
_MIXED = "mixed"
_NUMBERS = ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size")


@dataclass(frozen=True)
class LayerSchemes:
    """The schemes of a checkpoint's layers by name; `default` is that of all others, if any."""

    default: Scheme | None
    named: Mapping[str, Scheme] = field(default_factory=dict)

    def of(self, layer: str) -> Scheme | None:
        """The scheme of a layer; None where the block says nothing of it."""
        return self.named.get(layer, self.default)


def is_aqlm(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json says that it is an AQLM checkpoint."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "aqlm"


def parse_quantization_config(quantization: Mapping[str, Any], where: str) -> LayerSchemes:
    """The schemes in a `quantization_config` block. `where` names the file in errors.

    Raises CheckpointError for a foreign method, a missing key or an impossible value.
    """
    method = quantization.get("quant_method")
    if str(method).lower() != "aqlm":
        raise CheckpointError(f"{where}: quant_method is {method!r}, pvrt reads 'aqlm'")
    missing = [key for key in _NUMBERS if key not in quantization]
    if missing:
        raise CheckpointError(f"{where}: quantization_config lacks {', '.join(missing)}")
    skipped_modules(quantization, where)
    if quantization["num_codebooks"] == _MIXED:
        return LayerSchemes(None, _named(quantization.get("schemes"), where))
    try:
        return LayerSchemes(Scheme(*(quantization[key] for key in _NUMBERS)))
    except ValueError as error:
        raise CheckpointError(f"{where}: quantization_config: {error}") from error


def _named(schemes: Any, where: str) -> dict[str, Scheme]:
    if not isinstance(schemes, dict) or not schemes:
        raise CheckpointError(f"{where}: schemes must map every scheme to a list of layer names")
    named: dict[str, Scheme] = {}
    for text, layers in schemes.items():
        if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
            raise CheckpointError(f"{where}: schemes: {text} must have a list of layer names")
        try:
            scheme = Scheme.parse(text)
        except ValueError as error:
            raise CheckpointError(f"{where}: schemes: {error}") from error
        for layer in layers:
            if layer in named:
                raise CheckpointError(f"{where}: schemes names {layer} twice")
            named[layer] = scheme
    return named


def skipped_modules(quantization: Mapping[str, Any], where: str = CONFIG_FILE) -> list[str]:
    """Module names that the config keeps dense, from any published spelling.

    Entries are module names, tensor names ("lm_head.weight") or anchored ("mlp.gate$").
    Raises CheckpointError when the list is not a list of strings.
    """
    names: dict[str, None] = {}
    for key in ("linear_weights_not_to_quantize", "modules_to_not_convert"):
        entries = quantization.get(key) or []
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise CheckpointError(f"{where}: {key} must be a list of strings")
        for entry in entries:
            names[entry.removesuffix("$").removesuffix(".weight")] = None
    return list(names)


def quantization_config(
    linears: Mapping[str, Scheme],
    dense: Iterable[str],
    embeddings: Mapping[str, Scheme] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` block to write: of linear layers in codes, others, embeddings.

    Where one scheme has all linear layers and no embedding is in codes, the block is as published.
    Dense linears are listed by tensor name (transformers 4 tests those) and by module name
    (transformers 5 does). Version 5 treats an entry as the start of a pattern, so a name that also
    starts a quantised one ("mlp.gate", "mlp.gate_proj") is written with an anchor.
    """
    skip = []
    for name in dense:
        clash = any(other.startswith(name) for other in linears)
        skip += [f"{name}$" if clash else name, f"{name}.weight"]
    named = {**linears, **(embeddings or {})}
    schemes: dict[str, list[str]] = {}
    for name, scheme in named.items():
        schemes.setdefault(str(scheme), []).append(name)
    if len(schemes) == 1 and not embeddings:
        numbers: dict[str, Any] = _numbers(next(iter(named.values())))
    else:
        numbers = {**dict.fromkeys(_NUMBERS, _MIXED), "schemes": schemes}
    return {"quant_method": "aqlm", **numbers, "linear_weights_not_to_quantize": skip}


def _numbers(scheme: Scheme) -> dict[str, int]:
    return {name: getattr(scheme, name) for name in _NUMBERS}
