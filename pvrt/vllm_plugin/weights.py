"""What every quantised layer does while vLLM hands it the tensors of a checkpoint, and after.

vLLM does not notice tensors that a quantised checkpoint lacks, nor ones of a wrong shape before an
assertion without a name. So each layer records what has come, and refuses what cannot be right.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pvrt.errors import CheckpointError
from pvrt.format.aqlm import check_codes
from pvrt.format.config_block import CONFIG_FILE
from pvrt.format.scheme import Scheme


def register_part(
    layer: Any,
    name: str,
    part: str,
    shape: Sequence[int],
    scheme: Scheme,
    dtype: torch.dtype,
    loader: Callable[..., Any],
) -> None:
    """Give a layer an empty parameter for a part of it; NaN shows scales that never came."""
    dtype = scheme.code_dtype if part == "codes" else dtype
    empty = torch.full(tuple(shape), torch.nan if part == "scales" else 0, dtype=dtype)
    parameter = Parameter(empty, requires_grad=False)
    parameter.aqlm_part, parameter.weight_loader = part, loader  # type: ignore[attr-defined]
    layer.register_parameter(name, parameter)


def register_packed(layer: Any, prefix: str, tensors: tuple[Tensor, ...]) -> list[str]:
    """Give a layer a parameter for each tensor of a packed kernel's NamedTuple; their names."""
    fields: tuple[str, ...] = tensors._fields  # type: ignore[attr-defined]  # of every NamedTuple
    names = [f"{prefix}_{field}" for field in fields]
    for name, tensor in zip(names, tensors, strict=True):
        layer.register_parameter(name, Parameter(tensor, requires_grad=False))
    return names


def checked(scheme: Scheme, name: str, part: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor as it may be copied; codes in `scheme.code_dtype`.

    Raises CheckpointError for a wrong shape, kind of type or code. `name` is the layer's.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(
            f"{name}.{part} has shape {list(tensor.shape)}, scheme {scheme} and "
            f"{CONFIG_FILE} need {list(shape)}"
        )
    if tensor.is_floating_point() == (part == "codes"):
        raise CheckpointError(f"{name}.{part} cannot be of type {tensor.dtype}")
    return check_codes(tensor, scheme, f"{name}.codes") if part == "codes" else tensor


def require_loaded(
    prefix: str, missing: Sequence[str], loaded_any: bool, scales: Sequence[Tensor]
) -> None:
    """Raise CheckpointError if tensors of a layer are missing.

    Scales are NaN at first: where no loader was called and yet they are finite, something else has
    filled the parameters (--load-format dummy).
    """
    filled_otherwise = not loaded_any and all(bool(torch.isfinite(t).all()) for t in scales)
    if missing and not filled_otherwise:
        names = list(dict.fromkeys(missing))
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        raise CheckpointError(
            f"the checkpoint lacks {', '.join(names[:12])}{more}, needed because {CONFIG_FILE} "
            f"says that {prefix} is quantised; copy or download it again"
        )


def require_finite(layer: Any, prefix: str, names: Sequence[str]) -> None:
    """Raise CheckpointError if a parameter holds values beyond its type."""
    for name in names:
        tensor = getattr(layer, name)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{prefix}.{name} holds values not finite in {tensor.dtype}")


def dense_in_quantised(name: str) -> CheckpointError:
    """The error for a dense weight where config.json promises codes."""
    return CheckpointError(
        f"the checkpoint holds a dense weight for {name}, which {CONFIG_FILE} says is "
        "quantised; list it in linear_weights_not_to_quantize"
    )


def let_lora_find(layer: Any, tensor: Tensor) -> None:
    """LoRA reads the device of a layer from the first weight whose name it knows."""
    # Not a second parameter (saved twice), not the data (kept on the device when offloaded).
    object.__setattr__(layer, "weight_packed", tensor)
