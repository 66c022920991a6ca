"""PV-Tuning (arXiv 2405.14852): one optimizer step of continuous parameters and codes.

The student computes with decoded weights. After a backward pass every quantised layer has dL/dW and

    P step   pulls it back to codebooks and scales, which Adam moves (with all dense parameters)
    latent   a copy B of the weight takes a LAMB step along dL/dW (section 3.3, straight-through)
    V step   the groups where B is furthest from the weight get the codes nearest to B

All strategies that the paper compares share this loop; they differ in whether B outlives the step,
in the share of groups that may move, and in the rounding. A sharded run holds a slice of every
layer's rows per rank: rows have their own codes and scales, and only codebook gradients, norms and
the choice of groups are summed over ranks.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pvrt.format.scheme import Scheme
from pvrt_tune import parallel
from pvrt_tune.fit import nearest_sums
from pvrt_tune.parallel import Rows
from pvrt_tune.pv.adam import Adam
from pvrt_tune.pv.host_memory import slab_bytes
from pvrt_tune.pv.latent import Latent
from pvrt_tune.pv.representation import Representation
from pvrt_tune.pv.streamed import StreamedWeight
from pvrt_tune.randomness import branch
from pvrt_tune.settings import PVSettings, Recipe, StrategyName
from pvrt_tune.shapes import ModelShape


@dataclass(frozen=True)
class Strategy:
    """What the V step does. accumulates: B is kept between steps (straight-through estimation),
    otherwise it starts from the weight each time. subspace: only the share `fraction` of a layer's
    groups may move in a step. stochastic: rounding is drawn instead of nearest.
    """

    moves_codes: bool = True
    accumulates: bool = False
    subspace: bool = False
    stochastic: bool = False


#: The paper's table 1, by name.
STRATEGIES: dict[StrategyName, Strategy] = {
    "continuous": Strategy(moves_codes=False),
    "linearized": Strategy(),
    "stochastic": Strategy(stochastic=True),
    "straight-through": Strategy(accumulates=True),
    "subspace": Strategy(subspace=True),
    "subspace-straight-through": Strategy(accumulates=True, subspace=True),
}


def reach(bits: float) -> float:
    """How long steps of a weight with codes of so many bits are, as a share of the settings' rates.

    Those are for 2 bits. Every further bit halves the error of rounding, and that is how far a
    weight has to go. Below 2 bits nothing longer was tried.
    """
    return min(1.0, float(2.0 ** (2 - bits)))


#: Parts of a layer's optimizer state that every rank has whole; the others have a layer's rows.
WHOLE_PARTS = {"moment_columns", "searched_books", "books_moved"}


@dataclass(frozen=True)
class StepReport:
    """Gradient norm of the continuous parameters, share of groups whose codes changed, and seconds
    of the V step (latents, choice, search, decoding).
    """

    gradient_norm: float
    changed: float
    v_seconds: float


class PVLayer:
    """One quantised weight in training: its representation, the student's parameter and B.

    `weight` is the parameter [rows, in] that the student computes with (of a sharded run: the local
    rows); it always holds the decoded representation, rounded to its own type. A streamed one holds
    nothing, and its host memory has B.
    """

    def __init__(
        self, representation: Representation, weight: Tensor | StreamedWeight, settings: PVSettings
    ) -> None:
        self.representation, self.weight, self.settings = representation, weight, settings
        self.strategy = STRATEGIES[settings.strategy]
        self.groups, self.reach = representation.groups, reach(representation.bits)
        # Groups of the whole layer that may change in a step.
        everywhere = float(parallel.total(torch.tensor(float(self.groups))))
        self._allowed = math.ceil(settings.fraction * everywhere)
        self._by_gain = self.strategy.subspace and settings.gain_pool > 1
        self.latent: Latent | None = None
        if self.strategy.moves_codes:
            self.latent = Latent(
                representation.decode(),
                representation.group_size,
                settings.code_beta,
                accumulates=self.strategy.accumulates,
                low_memory=bool(settings.low_memory),
            )
            if isinstance(weight, StreamedWeight):
                self.latent.keep_on(weight.host)

    def pull_back(self, grad: Tensor) -> dict[str, Tensor]:
        """Gradients of the continuous parameters, those of shared ones summed over ranks."""
        grads = self.representation.pull_back(grad)
        shared = self.representation.shared()
        return {k: parallel.total(g) if k in shared else g for k, g in grads.items()}

    def step(self, grad: Tensor, factor: float, generator: torch.Generator) -> Tensor:
        """The V step after the continuous parameters have moved.

        grad: dL/dW [rows, in] float32. factor: of the learning rate's schedule. Returns how many
        groups here changed their codes (a number on the device), and renews `weight`.
        """
        decoded = self.representation.decode()
        changed = decoded.new_zeros((), dtype=torch.int64)
        if self.latent is not None:
            rate = self.settings.code_learning_rate * self.reach * factor
            target, distance = self.latent.step(decoded, grad, rate, generator)
            changed = self._move_codes(decoded, target, distance, generator)
        self._renew(decoded)
        return changed

    def renew(self) -> None:
        """Decode the representation into `weight`."""
        self._renew(self.representation.decode())

    def _renew(self, decoded: Tensor) -> None:
        if not isinstance(self.weight, StreamedWeight):
            with torch.no_grad():
                self.weight.copy_(decoded)

    def _move_codes(
        self, decoded: Tensor, target: Tensor, distance: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Give groups the codes nearest to the target; `decoded` is brought up to date.

        distance [groups]: of the target from the decoded weight. Returns how many groups moved.
        The number of candidates is all that a GPU is asked: searching the others would cost more.
        """
        g = self.representation.group_size
        draws = None
        if self.strategy.stochastic:
            own = branch(generator, distance.device)
            draws = torch.rand(self.groups, generator=own, device=distance.device)
        candidates = self._candidates(distance, draws)
        drawn = None if draws is None else draws.index_select(0, candidates)
        wanted, now = target.view(-1, g).index_select(0, candidates), decoded.view(-1, g)
        proposal = self.representation.nearest(wanted, candidates, drawn)
        kept = proposal.moves
        if self._by_gain:
            left = (wanted - proposal.values).square().sum(1)
            gain = torch.where(kept, distance.index_select(0, candidates).square() - left, 0)
            best, gains = parallel.top_share(gain, self._allowed)
            kept = torch.zeros_like(kept).index_copy_(0, best, gains)
        self.representation.assign(candidates, proposal, kept | ~proposal.moves)
        old = now.index_select(0, candidates)
        now.index_copy_(0, candidates, torch.where(kept.unsqueeze(1), proposal.values, old))
        return kept.sum()

    def _candidates(self, distance: Tensor, draws: Tensor | None) -> Tensor:
        """Numbers of the groups to search, by how far each is from its target, and draws [groups]
        of rounding at random.
        """
        # Choice by distance alone does not ask whether a group can move.
        asks = self._by_gain or not self.strategy.subspace
        movable = self.representation.movable(distance, draws) if asks else distance > 0
        if self.strategy.subspace:
            count = self._allowed * self.settings.gain_pool
            found, chosen = parallel.top_share(torch.where(movable, distance, 0), count)
            return found[chosen]
        return movable.nonzero().squeeze(1)

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the representation."""
        latent = {} if self.latent is None else self.latent.tensors()
        return {**latent, **self.representation.knowledge()}


class PVOptimizer:
    """All quantised layers and all dense parameters of a student.

    `weights` are the parameters [out, in] that the student computes with, by layer name, holding
    the decoded representations, or streamed; `dense` its other trainable parameters. Both collect
    gradients.
    """

    def __init__(
        self,
        representations: Mapping[str, Representation],
        weights: Mapping[str, nn.Parameter | StreamedWeight],
        dense: Mapping[str, nn.Parameter],
        settings: PVSettings,
    ) -> None:
        self.weights, self.settings = weights, settings
        self.layers = {}
        for name, representation in representations.items():
            weight = weights[name]
            here = weight if isinstance(weight, StreamedWeight) else _local(weight)
            self.layers[name] = PVLayer(representation, here, settings)
        reaches = [layer.reach for layer in self.layers.values()]
        self.continuous: dict[str, Tensor] = dict(dense)
        shares = dict.fromkeys(dense, sum(reaches) / max(1, len(reaches)))
        # Held whole by every rank: shared codebooks, and what is not decoded.
        self.replicated, self.whole_dense = set(dense), sorted(dense)
        for name, layer in self.layers.items():
            for part, tensor in layer.representation.continuous().items():
                self.continuous[f"{name}.{part}"] = tensor
                shares[f"{name}.{part}"] = layer.reach
                if part in layer.representation.shared():
                    self.replicated.add(f"{name}.{part}")
        squares = self._squares(self.continuous)
        counts = self._sums(
            {name: torch.tensor(float(t.numel())) for name, t in self.continuous.items()}
        )
        self.rates = {
            name: settings.learning_rate * share * math.sqrt(squares[name] / max(counts[name], 1.0))
            for name, share in shares.items()
        }
        rates = [self.rates[name] for name in self.continuous]
        self.adam = Adam(list(self.continuous.values()), rates, settings.betas)

    def step(self, factor: float, generator: torch.Generator) -> StepReport:
        """One PV step from the student's gradients; `factor` scales both learning rates.

        The V step's random draws come from `generator`, a different one for every step and equal
        on all ranks.
        """
        for name, layer in self.layers.items():
            for part, value in layer.pull_back(self._gradient(name)).items():
                self.continuous[f"{name}.{part}"].grad = value
        for name in self.whole_dense if parallel.world() > 1 else ():
            kept = self.continuous[name].grad
            if kept is not None:
                kept.copy_(parallel.total(kept) / parallel.world())
        norm = self._clip()
        self.adam.step(factor)
        changed, groups = [], 0
        started = time.perf_counter()
        for name, layer in self.layers.items():
            changed.append(layer.step(self._gradient(name), factor, generator))
            groups += layer.groups
            self.weights[name].grad = None
        moved = int(torch.stack(changed).sum())  # the one number that waits for all layers
        seconds = time.perf_counter() - started
        counts = parallel.total(torch.tensor([float(moved), float(groups)]))
        return StepReport(norm, float(counts[0] / counts[1]), seconds)

    def _gradient(self, name: str) -> Tensor:
        """dL/dW of one layer's local rows in float32, which only one layer at a time takes."""
        grad = self.weights[name].grad
        if grad is None:
            raise ValueError(f"{name} took no part in the backward pass")
        return _local(grad).float()

    def _squares(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """Sum of squares of every tensor, over all ranks."""
        return self._sums({name: t.detach().float().square().sum() for name, t in tensors.items()})

    def _sums(self, scalars: Mapping[str, Tensor]) -> dict[str, float]:
        """Scalars summed over ranks, but for tensors that every rank holds whole."""
        share = {n: 1 / parallel.world() if n in self.replicated else 1.0 for n in scalars}
        stacked = torch.stack(list(scalars.values())).cpu()  # one wait for all
        stacked *= torch.tensor(list(share.values()))
        return dict(zip(scalars, parallel.total(stacked).tolist(), strict=True))

    def _clip(self) -> float:
        """Scale the continuous gradients to at most `clip_norm` in all; returns their norm."""
        grads = {n: t.grad for n, t in self.continuous.items() if t.grad is not None}
        norm = math.sqrt(sum(self._squares(grads).values()))
        if norm > self.settings.clip_norm:
            torch._foreach_mul_(list(grads.values()), self.settings.clip_norm / norm)
        return norm

    # ---- state ----

    def student(self) -> dict[str, Rows]:
        """All that is trained, by checkpoint name: representations and dense parameters."""
        state = {name: self._rows(name, self.continuous[name]) for name in self.whole_dense}
        for name, layer in self.layers.items():
            shared = layer.representation.shared()
            for part, tensor in layer.representation.tensors().items():
                rows = None if part in shared else self.weights[name].shape[0]
                state[f"{name}.{part}"] = Rows(tensor, rows)
        return state

    def optimizer(self) -> dict[str, dict[str, Rows]]:
        """What a resumed run needs besides the student, by the name of a layer or a continuous
        tensor and by part.
        """
        state = {}
        for name, layer in self.layers.items():
            rows = self.weights[name].shape[0]
            state[name] = {
                part: Rows(tensor, None if part in WHOLE_PARTS else rows)
                for part, tensor in layer.tensors().items()
            }
        moments = zip(self.continuous, self.adam.averages, self.adam.squares, strict=True)
        for name, average, square in moments:
            state[name] = {
                "exp_avg": self._rows(name, average),
                "exp_avg_sq": self._rows(name, square),
            }
        return state

    def tensors(self) -> dict[str, Rows]:
        """Student and optimizer together: what `resume` fills."""
        student = {f"student/{name}": rows for name, rows in self.student().items()}
        parts = {
            f"optimizer/{name}/{part}": rows
            for name, state in self.optimizer().items()
            for part, rows in state.items()
        }
        return student | parts

    def resume(self, number: int, fill: Callable[[Mapping[str, Rows]], None]) -> None:
        """Go on after step `number`; `fill` puts what was saved then into `tensors()`."""
        self.adam.counts = [number] * len(self.adam.counts)
        with torch.no_grad():
            fill(self.tensors())
        for layer in self.layers.values():
            layer.renew()

    def _rows(self, name: str, tensor: Tensor) -> Rows:
        """What is here of a continuous tensor or one of its moments."""
        layer = name.rpartition(".")[0]
        height = None if name in self.replicated else self.weights[layer].shape[0]
        return Rows(tensor.detach(), height)


def latent_bytes(model: ModelShape, settings: PVSettings) -> int:
    """Latent weights and their second moments."""
    strategy, weights = STRATEGIES[settings.strategy], sum(block.weights for block in model.blocks)
    latent = (2 if settings.low_memory else 4) * strategy.accumulates
    moment = (0 if settings.low_memory else 4) * strategy.moves_codes
    return (latent + moment) * weights


def state_bytes(model: ModelShape, trained: int) -> int:
    """What a step needs besides, and a resumed run, with `trained` continuous numbers."""
    # Of searches: a limit of every group, and the codebooks that they hold for.
    bounds = sum(2 * block.groups + 4 * block.floats for block in model.blocks)
    # Continuous numbers have two moments of Adam.
    return bounds + sum(block.codes for block in model.blocks) + 3 * 4 * trained


def streamed_bytes(model: ModelShape, settings: PVSettings, itemsize: int) -> int:
    """Host memory of streamed weights: gradients of `itemsize` bytes a number, then all that is
    kept of latent weights.
    """
    strategy, low = STRATEGIES[settings.strategy], bool(settings.low_memory)
    shapes = [shape for block in model.blocks for shape in block.linears]
    sizes = [itemsize * out * inputs for out, inputs in shapes]
    for out, inputs in shapes if strategy.moves_codes else ():
        sizes += [(2 if low else 4) * out * inputs] * strategy.accumulates
        sizes += [4 * out, 4 * inputs] if low else [4 * out * inputs]
    return slab_bytes(tuple(sizes))


def step_bytes(model: ModelShape, recipe: Recipe, device: str) -> int:
    """Peak of one step on "cpu" or a GPU, beyond gradients and state: that of the largest layer."""
    strategy, settings = STRATEGIES[recipe.pv.strategy], recipe.pv
    largest, scheme = max(block.largest for block in model.blocks), recipe.parsed_scheme
    group_size = scheme.in_group_size if isinstance(scheme, Scheme) else 1
    share = min(1, settings.fraction * settings.gain_pool) if strategy.subspace else 1
    share *= strategy.moves_codes
    searched = int(share * largest / group_size)
    # In float32: gradient, decoded weight and target; then direction and a difference, or what
    # rounds at random; or else the values that groups want and find, and their search.
    step = 4 * (2 + bool(settings.low_memory)) * largest
    search = 4 * 4 * searched * group_size
    if isinstance(scheme, Scheme):
        search += nearest_sums.peak_bytes(searched, scheme, device)
    return 4 * 3 * largest + max(step, search) + 4 * 4 * largest // group_size


def _local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that this rank holds; an ordinary tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    local: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return local
