"""What PV-Tuning needs to know of a quantised weight, whatever its format.

PV-Tuning (arXiv 2405.14852, section 3) asks four things of a representation: decode the weight;
name its continuous parameters and pull a gradient back to them (P step); cut the weight into groups
that have codes of their own; move chosen groups to the admissible value nearest a target (V step).

A representation may hold a slice of the weight's rows, as a rank of a sharded run does.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt_kernels import aqlm_dequantize, aqlm_parameter_grads
from pvrt_tune.fit.grid import GridLinear
from pvrt_tune.fit.nearest_sums import values_of
from pvrt_tune.pv.code_search import new_codes
from pvrt_tune.pv.search_bounds import SearchBounds


@dataclass(frozen=True)
class Proposal:
    """New codes for some groups, in the representation's own layout, and the weights they mean.

    values: [n, group_size] float32. moves [n]: whether the codes differ from those the groups have.
    bounds [n]: by how much less the target is away from the value than from any other, halved and
    unscaled (see search_bounds.py); None where nobody needs it.
    """

    codes: Tensor
    values: Tensor
    moves: Tensor
    bounds: Tensor | None = None


class Representation(ABC):
    """A quantised weight [rows, in]; groups are runs of `group_size` inputs, row by row. bits: of
    the codes of a weight.
    """

    group_size: int
    groups: int
    bits: float

    @abstractmethod
    def continuous(self) -> dict[str, Tensor]:
        """Parameters that the P step moves, by name; leaf tensors in float32."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by checkpoint name; those not shared have the rows first."""

    @abstractmethod
    def shared(self) -> set[str]:
        """Continuous parameters that all rows share (sharded runs sum their gradients)."""

    @abstractmethod
    def decode(self) -> Tensor:
        """The weight [rows, in] in float32, outside any graph."""

    @abstractmethod
    def pull_back(self, grad_weight: Tensor) -> dict[str, Tensor]:
        """dL/dW [rows, in] -> gradients of the continuous parameters."""

    @abstractmethod
    def nearest(self, target: Tensor, groups: Tensor, draws: Tensor | None = None) -> Proposal:
        """Admissible values nearest to targets [n, group_size] of the groups with numbers [n].

        The search never proposes a value further away than the present one. With draws [n] from
        [0, 1) the runner-up is proposed with the chance that makes rounding unbiased along the line
        between the two best candidates (the usual stochastic rounding where the grid is scalar).
        """

    @abstractmethod
    def assign(self, groups: Tensor, proposal: Proposal, taken: Tensor) -> None:
        """Give those of the groups [n] that are `taken` [n] the codes of a proposal, which may be
        those they have. (A mask, because counting the taken ones would wait for a GPU.)
        """

    @abstractmethod
    def movable(self, distance: Tensor, draws: Tensor | None = None) -> Tensor:
        """Which groups `nearest` may move, by the distance [rows * groups] of their targets from
        their values and the draws of each: a mask. To be asked once after every change of
        continuous parameters.
        """

    def knowledge(self) -> dict[str, Tensor]:
        """What `movable` knows, by name: of a resumed run, not of a checkpoint."""
        return {}


class AdditiveRepresentation(Representation):
    """Additive codebooks (AQLM; with one codebook, plain vector quantisation) of one layer.

    `rows` is the slice of output rows held here. The layer's tensors are copied to float32.
    """

    def __init__(self, layer: AQLMLinear, rows: slice = slice(None)) -> None:
        if layer.scheme.out_group_size != 1:
            raise ValueError(f"scheme {layer.scheme} spans output rows, which tuning cannot move")
        self.group_size = layer.scheme.in_group_size
        self.bits = layer.scheme.code_bits
        self.codes = layer.codes.detach()[rows].clone()
        self.codebooks = layer.codebooks.detach().float().clone()
        self.scales = layer.scales.detach()[rows].float().clone()
        self._flat_codes = self.codes.view(-1, self.codes.shape[2])
        self._groups_per_row = self.codes.shape[1]
        self.groups = len(self._flat_codes)
        self._mask = layer.scheme.codebook_size - 1
        self._bounds = SearchBounds(len(self.codes), self._groups_per_row, self._codebooks())

    def _codebooks(self) -> Tensor:
        """Codebooks [M, K, g]."""
        return self.codebooks.detach().squeeze(2)

    def continuous(self) -> dict[str, Tensor]:
        return {"codebooks": self.codebooks, "scales": self.scales}

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "codebooks": self.codebooks, "scales": self.scales}

    def shared(self) -> set[str]:
        return {"codebooks"}

    def decode(self) -> Tensor:
        with torch.no_grad():
            return aqlm_dequantize(self.codes, self.codebooks, self.scales)

    def pull_back(self, grad_weight: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            codebooks, scales = aqlm_parameter_grads(
                grad_weight, self.codes, self.codebooks, self.scales
            )
        return {"codebooks": codebooks, "scales": scales}

    def nearest(self, target: Tensor, groups: Tensor, draws: Tensor | None = None) -> Proposal:
        codebooks = self._codebooks()
        scale = self.scales.detach().reshape(-1, 1)[groups // self._groups_per_row]
        present = self._flat_codes.index_select(0, groups).long() & self._mask
        # A scale of zero says nothing about codes: such groups want what they have.
        wanted = torch.where(scale == 0, values_of(codebooks, present), target / scale)
        choice = new_codes(wanted, present, codebooks, draws)
        codes = choice.codes.to(self.codes.dtype)
        return Proposal(codes, choice.values * scale, choice.moves, choice.bounds)

    def assign(self, groups: Tensor, proposal: Proposal, taken: Tensor) -> None:
        assert proposal.bounds is not None
        self._bounds.learn(groups, proposal.bounds, same=~proposal.moves, known=taken)
        _put(self._flat_codes, groups, proposal.codes, taken.unsqueeze(1))

    def movable(self, distance: Tensor, draws: Tensor | None = None) -> Tensor:
        self._bounds.follow(self._codebooks())
        shape = self._bounds.limits.shape
        scale = self.scales.detach().reshape(-1, 1).abs()
        unscaled = distance.view(shape) / scale
        exceeded = self._bounds.exceeded(unscaled, None if draws is None else draws.view(shape))
        return (exceeded & (scale > 0)).view(-1)

    def knowledge(self) -> dict[str, Tensor]:
        return self._bounds.tensors()


class GridRepresentation(Representation):
    """A scalar grid: every weight is a group of its own, with a code on its group's scale."""

    group_size = 1

    def __init__(self, layer: GridLinear, rows: slice = slice(None)) -> None:
        self.bits = float(layer.scheme.bits)
        self.codes = layer.codes.detach()[rows].clone()
        self.groups = self.codes.numel()
        self.scales = layer.scales.detach()[rows].float().clone()
        self._levels = layer.scheme.levels
        self._width, self._group = layer.in_features, layer.scheme.group_size
        self.zeros = None if layer.zeros is None else layer.zeros.detach()[rows].clone()

    def continuous(self) -> dict[str, Tensor]:
        return {"scales": self.scales}

    def tensors(self) -> dict[str, Tensor]:
        zeros = {} if self.zeros is None else {"zeros": self.zeros}
        return {"codes": self.codes, "scales": self.scales, **zeros}

    def shared(self) -> set[str]:
        return set()

    def _steps(self) -> Tensor:
        """codes - zeros [rows, in/G, G]."""
        codes = self.codes.view(*self.scales.shape, self._group).float()
        return codes - self._middle().unsqueeze(2)

    def _middle(self) -> Tensor:
        """Zeros [rows, in/G] as numbers."""
        if self.zeros is None:
            return torch.full_like(self.scales, (self._levels + 1) // 2)
        return self.zeros.float()

    def decode(self) -> Tensor:
        return (self.scales.unsqueeze(2) * self._steps()).view(self.codes.shape)

    def pull_back(self, grad_weight: Tensor) -> dict[str, Tensor]:
        steps = self._steps()
        return {"scales": (grad_weight.float().view(steps.shape) * steps).sum(2)}

    def nearest(self, target: Tensor, groups: Tensor, draws: Tensor | None = None) -> Proposal:
        row, column = groups // self._width, groups % self._width
        scale = self.scales[row, column // self._group]
        zero = self._middle()[row, column // self._group]
        exact = torch.where(scale == 0, zero, target.squeeze(1) / scale + zero)
        present = self.codes.view(-1)[groups].float()
        codes = torch.where((exact - present).abs() <= 0.5, present, exact.round())
        if draws is not None:
            off = exact - codes
            codes += torch.where(draws < off.abs(), off.sign(), 0)
        codes = codes.clamp(0, self._levels)
        values = (scale * (codes - zero)).unsqueeze(1)
        return Proposal(codes.to(self.codes.dtype), values, codes != present)

    def assign(self, groups: Tensor, proposal: Proposal, taken: Tensor) -> None:
        _put(self.codes.view(-1), groups, proposal.codes, taken)

    def movable(self, distance: Tensor, draws: Tensor | None = None) -> Tensor:
        # A step of the grid is a scale: the next code is nearer from half of one on.
        scale = self.scales.detach().abs().unsqueeze(2)
        scale = torch.where(scale == 0, torch.inf, scale)
        shape = *scale.shape[:2], self._group
        share = 0.5 if draws is None else draws.clamp(max=0.5).view(shape)
        return (distance.view(shape) > scale * share).view(-1)


def _put(where: Tensor, rows: Tensor, values: Tensor, taken: Tensor) -> None:
    """where[rows] = values, but only those that are taken."""
    where[rows] = torch.where(taken, values, where[rows])


def represent(layer: nn.Module, rows: slice = slice(None)) -> Representation:
    """The representation of a quantised module; ValueError when PV-Tuning knows none."""
    if isinstance(layer, AQLMLinear):
        return AdditiveRepresentation(layer, rows)
    if isinstance(layer, GridLinear):
        return GridRepresentation(layer, rows)
    raise ValueError(f"{type(layer).__name__} is not a quantised layer that can be PV-tuned")
