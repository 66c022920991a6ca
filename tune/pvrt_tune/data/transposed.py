"""Weights that files hold transposed: turned round as they are read."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pvrt_tune.data.stored_weights import StoredWeights, targets


def turned(
    model: Any, stored: StoredWeights, transforms: Sequence[Any], names: Collection[str]
) -> StoredWeights:
    """The same tensors, those that become one of `names` of a model as their transposes."""
    weights = dict(stored.weights)
    for key, target, _ in targets(model, stored, transforms):
        if target in names:
            weight = weights[key]
            weights[key] = weight.T if isinstance(weight, Tensor) else _Transposed(weight)
    return StoredWeights(weights, stored.files)


@dataclass(frozen=True)
class _Transposed:
    """A weight that is turned round when it is indexed."""

    weight: Any

    def get_shape(self) -> list[int]:
        return list(self.weight.get_shape())[::-1]

    def get_dtype(self) -> str:
        return str(self.weight.get_dtype())

    def __getitem__(self, index: Any) -> Tensor:
        whole: Tensor = self.weight[...]
        return whole.T[index]
