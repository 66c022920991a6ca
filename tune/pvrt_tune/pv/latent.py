"""The latent weight B of PV-Tuning, which takes a LAMB step along dL/dW before codes are chosen.

arXiv 2405.14852, section 3.3; LAMB is arXiv 1904.00962: Adam's direction, scaled to a share of the
weight's norm. There is no first moment: what accumulates here is B itself.
"""

import torch
from torch import Tensor

from pvrt_kernels.cpu import pv_step
from pvrt_tune import parallel
from pvrt_tune.pv.host_memory import HostMemory
from pvrt_tune.randomness import branch

# Keeps a direction finite where a gradient was always zero; pv_step.c has the same.
_TINY = 1e-12


class Latent:
    """B of one layer's rows here, and the running mean of its squared gradients.

    weight [rows, in] float32: the decoded one, where B starts. accumulates: B outlives a step
    (straight-through estimation), otherwise each step starts at the decoded weight. group: elements
    of a group. beta: how fast the running mean forgets. low_memory: B in bfloat16 with stochastic
    rounding and its second moment factored into rows and columns (arXiv 1804.04235): 2 bytes per
    weight instead of 8.
    """

    def __init__(
        self, weight: Tensor, group: int, beta: float, *, accumulates: bool, low_memory: bool
    ) -> None:
        self._group, self._beta = group, beta
        kept = torch.bfloat16 if low_memory else torch.float32
        self.value = weight.detach().to(kept, copy=True) if accumulates else None
        rows, columns = weight.shape
        self._rows = float(parallel.total(torch.tensor(float(rows))))  # of the whole layer
        sizes: dict[str, tuple[int, ...]] = {"second_moment": (rows, columns)}
        if low_memory:
            sizes = {"moment_rows": (rows,), "moment_columns": (columns,)}
        self.moments = {
            name: torch.zeros(size, device=weight.device) for name, size in sizes.items()
        }

    def keep_on(self, host: HostMemory) -> None:
        """Have all that is kept between steps in host memory."""
        self.value = None if self.value is None else host.keep(self.value)
        self.moments = {name: host.keep(moment) for name, moment in self.moments.items()}

    def step(
        self, decoded: Tensor, grad: Tensor, rate: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Move by the share `rate` of B's norm against grad; both tensors [rows, in] float32.

        Returns B in float32, to be read only, and the distance of each of its groups from the
        decoded weight's [rows * in / group]. The running mean of squares is not debiased, for
        LAMB's normalisation takes any common factor out. `generator` rounds B where it is kept in
        bfloat16.
        """

        def length(squares: Tensor) -> Tensor:
            size, direction = parallel.total(squares).sqrt().double()
            ratio: Tensor = rate * size / direction.clamp_min(1e-30)
            return ratio

        # Themselves where they are on the device.
        value = None if self.value is None else self.value.to(decoded.device)
        moments = {name: moment.to(decoded.device) for name, moment in self.moments.items()}
        target = decoded.clone() if value is None else value.float()
        moment = moments.get("second_moment")
        if moment is not None and pv_step.can_step(target, grad, moment, decoded):
            distance = pv_step.latent_step(
                target, grad, moment, decoded, self._group, self._beta, lambda s: float(length(s))
            )
        else:
            root = self._root_moment(grad, moments).add_(_TINY)
            direction = torch.div(grad, root, out=root)
            norms = torch.stack([torch.linalg.vector_norm(part) for part in (target, direction)])
            # A number on the device: reading it would wait for all that is before it.
            target.addcmul_(direction, length(norms.square_()).float(), value=-1)
            distance = torch.linalg.vector_norm((target - decoded).view(-1, self._group), dim=1)
        if value is not None and value.dtype is torch.bfloat16:
            value.copy_(_round_stochastically(target, generator))
        _put_back(self.value, value)
        for name, moved in moments.items():
            _put_back(self.moments[name], moved)
        return target, distance

    def _root_moment(self, grad: Tensor, moments: dict[str, Tensor]) -> Tensor:
        """Root of the running mean of squared gradients, or of its factors (a new tensor)."""
        beta = self._beta
        if "second_moment" in moments:
            kept = moments["second_moment"]
            return kept.mul_(beta).addcmul_(grad, grad, value=1 - beta).sqrt()
        square = grad.square()
        rows = moments["moment_rows"].lerp_(square.mean(1), 1 - beta)
        columns = parallel.total(square.sum(0)) / self._rows
        moments["moment_columns"].lerp_(columns, 1 - beta)
        mean = parallel.total(rows.sum()) / self._rows
        return torch.outer(rows, moments["moment_columns"] / mean.clamp_min(1e-30)).sqrt_()

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs, by name."""
        return self.moments if self.value is None else {"latent": self.value, **self.moments}


def _put_back(kept: Tensor | None, moved: Tensor | None) -> None:
    """Bring what is kept elsewhere up to date."""
    if kept is not None and moved is not None and kept is not moved:
        kept.copy_(moved)


def _round_stochastically(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, up or down with the chance that keeps the mean."""
    device = tensor.device
    noise = torch.randint(
        1 << 16,
        tensor.shape,
        generator=branch(generator, device),
        dtype=torch.int32,
        device=device,
    )
    return ((tensor.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()
