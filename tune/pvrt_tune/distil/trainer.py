"""The training loop of PV-Tuning: a student, its teacher, held-out text, and states on disk."""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pvrt.progress import Event, clock_time
from pvrt_tune import parallel, shards
from pvrt_tune.data.text import CalibrationData
from pvrt_tune.distil.loss import (
    Head,
    Teacher,
    head_bytes,
    kl_bytes,
    kl_loss,
    pull_back,
    table_of,
)
from pvrt_tune.distil.student import Student
from pvrt_tune.progress import Report
from pvrt_tune.pv.optimizer import PVOptimizer, latent_bytes, state_bytes, step_bytes
from pvrt_tune.pv.streamed import StreamedWeight
from pvrt_tune.randomness import seeded
from pvrt_tune.settings import Recipe
from pvrt_tune.shapes import ModelShape
from pvrt_tune.store import Store

#: Pieces of a run, numbered by step: the best student so far, and the state to go on from.
BEST, STATE = "pv-best-", "pv-state-"
#: Steps before a time limit is turned into a number of steps; again after twice as many, and so on:
#: the first steps pay for the original model's states of several. And the share of the time left
#: that steps may take (looks at held-out text and saved states take the rest).
_PROBES = {3 << doubling for doubling in range(32)}
_SHARE_OF_STEPS = 0.9
#: How many times as long as a snapshot takes there is none.
SNAPSHOT_SPACING = 10


@dataclass(frozen=True)
class Outcome:
    """What training reached: held-out KL before and at the best step, and the curves.

    complete: all planned steps were done, or patience ended them; otherwise time ran out.
    """

    before: float
    best: float
    complete: bool
    curves: list[dict[str, float]]


class Trainer:
    """Runs PV steps; every state that matters goes to the run folder, so that it can be resumed.

    data: what the teacher knows, its first `held_out` windows only for choosing the best.
    recipe: one with training.
    """

    def __init__(
        self, student: Student, teacher: Teacher, data: CalibrationData, recipe: Recipe
    ) -> None:
        recipe = recipe.settled
        assert recipe.training is not None
        settings = recipe.training
        self.student, self.teacher, self.settings, self.seed = (
            student,
            teacher,
            settings,
            recipe.seed,
        )
        self.data, self.held_out = data, settings.held_out
        self._at_once = settings.microbatch or settings.batch
        model = student.model
        model.requires_grad_(False)
        weights = student.weights()
        dense = student.dense(settings.freeze_embeddings)
        for parameter in (*weights.values(), *dense.values()):
            parameter.requires_grad_(True)
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(student.compute)
        if settings.recompute_activations:
            _recompute_activations(model)
        tuned: dict[str, nn.Parameter | StreamedWeight] = {**weights, **student.streamed}
        self.optimizer = PVOptimizer(student.representations, tuned, dense, recipe.pv)
        self.step, self.steps = 0, settings.steps
        self._snapshot = 0.0, 0.0  # seconds that the last took, and when it ended
        self.curves: list[dict[str, float]] = []

    def run(self, store: Store, report: Report, deadline: float | None = None) -> Outcome:
        """Train to the last step, the deadline (time.monotonic) or the end of patience.

        Goes on from the newest state of the run folder. The best student is kept there. Raises
        KeyboardInterrupt between steps on every rank when any of several was interrupted.
        """
        self._resume(store)
        if not self.curves:
            self._evaluate(store, report)
        started, begun = time.monotonic(), self.step
        while self.step < self.steps and not self._stale():
            parallel.stop_if_asked()
            if deadline is not None and parallel.agreed(time.monotonic() - deadline) > 0:
                break
            figures = self.train_step()
            pace = (time.monotonic() - started) / (self.step - begun)
            if deadline is not None and self.step in _PROBES:
                self._plan(deadline, pace, report)
            if self.step % self.settings.evaluate_every == 0 or self.step >= self.steps:
                self._evaluate(store, report, {**figures, "left": pace * (self.steps - self.step)})
                if self.settings.snapshots and self._snapshot_is_due():
                    self._save(store)
        kls = [row["held_out_kl"] for row in self.curves]
        return Outcome(
            kls[0],
            min(kls),
            self.step >= self.steps or self._stale(),
            self.curves,
        )

    def _plan(self, deadline: float, pace: float, report: Report) -> None:
        """As many steps as fit into the time, so that the learning rates end at zero with it."""
        left = parallel.agreed((deadline - time.monotonic()) * _SHARE_OF_STEPS / pace)
        self.steps = max(self.step, min(self.settings.steps, self.step + int(left)))
        report(f"{self.steps} PV steps of about {pace:.1f} s fit into the time")

    def train_step(self) -> dict[str, float]:
        """One optimizer step on the next batch; returns its figures."""
        started = time.perf_counter()
        batch = self._batch(self.step)
        self.teacher.prepare(batch)
        loss = torch.zeros((), dtype=torch.float64)
        model, world = self.student.model, parallel.world()
        head, table = Head.of(model, self.student.compute), table_of(model.get_output_embeddings())
        if table is not None:  # decoded once, and its gradient goes back to codebooks once
            shape, device = head.weight.shape, head.weight.device
            head = replace(head, gradient=torch.zeros(shape, device=device))
        for numbers, share in parallel.dealt(batch, self._at_once):
            # Gradients of a sharded run are means over ranks.
            part = self._loss(numbers, head, share * world)
            (part * share * world).backward()  # type: ignore[no-untyped-call]
            loss += part.item() * share
        gradient = head.gradient
        del head  # before the step
        if table is not None and gradient is not None:
            pull_back(table, gradient)
            del gradient
        generator = seeded(self.seed, f"V step {self.step}")
        outcome = self.optimizer.step(self.settings.factor(self.step, self.steps), generator)
        self.step += 1
        return {
            "train_kl": float(parallel.total(loss)),
            "gradient_norm": outcome.gradient_norm,
            "changed": outcome.changed,
            "seconds": time.perf_counter() - started,
            "v_seconds": outcome.v_seconds,
        }

    def held_out_kl(self) -> float:
        """Mean KL over the held-out windows."""
        numbers = range(self.held_out)
        self.teacher.prepare(numbers)
        kls = torch.zeros(self.held_out, dtype=torch.float64)
        with torch.no_grad():
            head = Head.of(self.student.model, self.student.compute)
            for (number,), share in parallel.dealt(numbers, 1):
                kl = float(self._loss([number], head))
                kls[number] = kl if share else 0.0
        # A sum of one number and zeros: the mean is the same over any number of ranks.
        return float(parallel.total(kls).mean())

    def _loss(self, numbers: list[int], head: Head, factor: float = 1.0) -> Tensor:
        """Mean KL over windows of `data` by number, as `kl_loss`; `head` is the student's."""
        hidden = self.student.final_hidden(self.data[numbers])
        target = self.teacher.hidden(numbers).to(hidden.device).flatten(0, 1)
        return kl_loss(hidden.flatten(0, 1), head, target, self.teacher.head, factor)

    def _batch(self, step: int) -> list[int]:
        """Windows of a step: in order at first, in a new random order every epoch."""
        size, count = self.settings.batch, len(self.data) - self.held_out
        first = step * size
        numbers = []
        for position in range(first, first + size):
            epoch, offset = divmod(position, count)
            numbers.append(self.held_out + (offset if epoch == 0 else self._order(epoch)[offset]))
        return numbers

    def _order(self, epoch: int) -> list[int]:
        generator = seeded(self.seed, f"epoch {epoch}")
        count = len(self.data) - self.held_out
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order

    def _stale(self) -> bool:
        kls = [row["held_out_kl"] for row in self.curves]
        return len(kls) - 1 - kls.index(min(kls)) >= self.settings.patience

    # ---- states ----

    def _evaluate(
        self, store: Store, report: Report, figures: dict[str, float] | None = None
    ) -> None:
        row = {"step": float(self.step), "held_out_kl": self.held_out_kl(), **(figures or {})}
        left = row.pop("left", None)
        self.curves.append(row)
        is_best = row["held_out_kl"] <= min(r["held_out_kl"] for r in self.curves)
        if is_best:
            kept = {"step": self.step, "held_out_kl": row["held_out_kl"], "curves": [*self.curves]}
            tensors = self.tensors()
            parallel.together(lambda: store.save(f"{BEST}{self.step:07d}", tensors, kept))
            store.keep_last(BEST)
        report(_line(row, self.steps, left, is_best))

    def tensors(self) -> dict[str, Tensor]:
        """The student as it stands, on rank 0's host; every rank gives its rows, a tensor at a
        time.
        """
        whole = {name: parallel.gather(rows) for name, rows in self.optimizer.student().items()}
        return {name: tensor for name, tensor in whole.items() if tensor is not None}

    def _snapshot_is_due(self) -> bool:
        """Whether the last snapshot, unless it was quick, is so long ago as it should be."""
        taken, ended = self._snapshot
        waited = taken < 1 or time.monotonic() - ended > SNAPSHOT_SPACING * taken
        return parallel.agreed(waited)

    def _save(self, store: Store) -> None:
        name, started = f"{STATE}{self.step:07d}", time.monotonic()
        shards.save(store, name, self.optimizer.tensors(), self._report())
        store.keep_last(STATE)
        self._snapshot = time.monotonic() - started, time.monotonic()

    def _report(self) -> dict[str, Any]:
        return {"steps": self.steps, "curves": self.curves}

    def _resume(self, store: Store) -> None:
        name = shards.newest(store, STATE)
        if name is None:
            # What a run without snapshots had found before a kill may come from other steps.
            store.keep_last(BEST, 0)
            return
        saved = store.noted(name)
        self.step = int(name.rpartition("-")[2])
        self.steps = int(saved["steps"])
        self.curves = list(saved["curves"])
        self.optimizer.resume(self.step, lambda tensors: shards.fill(store, name, tensors))


def peak_bytes(model: ModelShape, recipe: Recipe, itemsize: int, device: str) -> int:
    """Peak of a `Trainer` on "cpu" or a GPU; its student computes in `itemsize` bytes a number.

    Where states are on the host, `streamed_bytes` are there.
    """
    recipe = recipe.settled
    settings, tokens = recipe.training, recipe.length
    assert settings is not None
    tokens *= settings.microbatch or settings.batch
    trained = model.trained(embeddings=not settings.freeze_embeddings)
    largest = max(block.largest for block in model.blocks)
    # What is frozen in its type; the optimizer's state; and gradients of what it trains.
    student = itemsize * model.dense * settings.freeze_embeddings
    student += sum(table.codes for table in model.ends)
    student += state_bytes(model, trained) + 4 * trained
    step = step_bytes(model, recipe, device)
    decoded = 0
    if settings.states == "host":
        # A layer's weight as it is decoded, and its gradients so far and now. In its step, what
        # comes from the host: its moment or B, and the gradient before it is float32.
        decoded = (4 + 3 * itemsize) * largest
        step += (4 + itemsize) * largest
    else:
        # Decoded weights with gradients.
        student += 2 * itemsize * sum(block.weights for block in model.blocks)
        student += latent_bytes(model, recipe.pv)
    if not model.ends and not settings.freeze_embeddings:
        student += 3 * 4 * model.vocabulary * model.width
    # What blocks leave for the backward pass, then the loss; or else the step, without a head.
    kept = sum(block.kept for block in model.blocks)
    if settings.recompute_activations:
        kept = len(model.blocks) * model.width + max(block.kept for block in model.blocks)
    passes = itemsize * tokens * kept + max(decoded, kl_bytes(model, tokens, itemsize))
    passes += head_bytes(model.ends[-1], itemsize) if model.ends else 0
    # Adam divides all at once on a GPU; large codebooks need as much while gradients reach them.
    divided = 4 * trained + 3 * 4 * largest
    return student + int(max(passes, step, divided))


def _recompute_activations(model: Any) -> None:
    """Keep only block inputs for the backward pass; nothing random may happen in training mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()


def _line(row: dict[str, float], steps: int, left: float | None, is_best: bool) -> Event:
    text = f"PV step {row['step']:.0f}/{steps}  held-out KL {row['held_out_kl']:.4f}"
    if is_best:
        text += " (best)"
    if "train_kl" in row:
        text += (
            f"  train {row['train_kl']:.4f}  changed {row['changed']:.4%}"
            f"  {row['seconds']:.1f} s/step"
        )
    if left is not None:
        text += f"  ETA {clock_time(left)}"
    return Event(text, "PV-Tuning", int(row["step"]), steps, left, best=is_best, **row)
