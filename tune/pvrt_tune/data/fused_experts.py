"""Originals that are published with their experts fused: taken apart as they are read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming
from transformers.core_model_loading import rename_source_key as renamed

from pvrt.errors import SourceError
from pvrt.modules.experts import ExpertList, Part
from pvrt_tune.data.stored_weights import StoredWeights


def taken_apart(
    model: Any, stored: StoredWeights, transforms: Sequence[Any]
) -> tuple[StoredWeights, list[Any]]:
    """The same tensors, those of fused experts as one for each projection and expert of a model,
    and the transforms that are left.

    Raises SourceError for fused experts of another shape or order than the model's.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ExpertList) and module.fused_in_files
    }
    if not lists:
        return stored, list(transforms)
    fused = [f"{name}.{own}" for name, module in lists.items() for own in module.fused_shapes]
    converters = [
        entry
        for entry in transforms
        if isinstance(entry, WeightConverter)
        and any(name.endswith(entry.target_patterns[0]) for name in fused)
    ]
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    own = model.state_dict()
    wanted = {**own, **dict.fromkeys(fused, "")}
    weights, files = dict(stored.weights), dict(stored.files)
    for key, file in stored.files.items():
        target, source = renamed(key, renamings, converters, model.base_model_prefix, wanted)
        name, _, tensor = target.rpartition(".")
        if name not in lists or tensor not in lists[name].fused_shapes:
            continue
        experts, found = lists[name], stored.shape(key)
        wide = experts.fused_shapes[tensor]
        steps = [step for c in converters if source in c.source_patterns for step in c.operations]
        swapped = bool(steps) and found != wide
        expected = [wide[0], *wide[:0:-1]] if swapped else wide
        if found != expected or not all(isinstance(step, Transpose) for step in steps):
            raise SourceError(
                f"{file}: {key} has shape {found}, config.json asks for {wide}; the experts belong "
                "to another model, or are stored in a way that pvrt does not read"
            )
        weight = weights.pop(key)
        del files[key]
        for leaf, part in experts.parts():
            if part.tensor == tensor:
                part = replace(part, transposed=part.transposed != swapped)
                each = f"{name}.{leaf}"
                weights[each] = _Expert(weight, part, list(own[each].shape))
                files[each] = file
    return StoredWeights(weights, files), [t for t in transforms if t not in converters]


@dataclass(frozen=True)
class _Expert:
    """One expert's tensor of a fused one, read when it is indexed."""

    weight: Any
    part: Part
    shape: list[int]

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return str(self.weight.get_dtype())

    def __getitem__(self, index: Any) -> Tensor:
        return self.part.of(self.weight)[index]
