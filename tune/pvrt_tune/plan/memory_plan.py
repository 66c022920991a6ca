"""What a tuning run will need and give, before a byte of weights is read: `pvrt plan MODEL`.

Everything is arithmetic on the shapes of the model's skeleton. Each stage states the peak of its
tensors beside its own code, where tests measure it; here they are added up and compared, with what
a process has besides. benchmarks/plan.py compares the result with the resident memory of whole
runs. What is counted is memory that the run itself must have: pages of mapped model files come on
top where there is room, and go when there is none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Literal

from pvrt.kv_cache import CacheShape, cache_shape
from pvrt_tune import write_checkpoint
from pvrt_tune.calibrate import block_tuning, ends, stage
from pvrt_tune.data import sampled
from pvrt_tune.data.activations import store_bytes
from pvrt_tune.data.text import Windows
from pvrt_tune.distil import loss, trainer
from pvrt_tune.fit import layer
from pvrt_tune.machine import compute_dtype, host_dtype
from pvrt_tune.model_blocks import batch_size, observe_bytes
from pvrt_tune.plan.skeleton import Result, model_shape, result_of
from pvrt_tune.plan.speed import Speed
from pvrt_tune.pv import optimizer
from pvrt_tune.settings import Recipe
from pvrt_tune.time_limit import Cuts

#: Python with torch and transformers; each entry of the tokenizer's vocabulary with its merge; what
#: reading a GGUF file leaves besides its tensors; on a GPU, CUDA's libraries.
PROCESS_BYTES = 280_000_000
TOKENIZER_BYTES = 500
GGUF_BYTES = 30_000_000
CUDA_HOST_BYTES = 1_000_000_000
#: CUDA's context and cuBLAS' workspaces on the device.
CUDA_DEVICE_BYTES = 700_000_000
#: Bytes per second that a disk takes, synced and hashed.
DISK_SPEED = 3e8
#: Bytes per second that are read from a disk which is fit for such a model.
READ_SPEED = 2e9

#: Phases by name that a time limit has its own rules for.
SAMPLING, PV_TUNING = "sampling", "PV-Tuning"


@dataclass(frozen=True)
class Phase:
    """Peak need of one stage. On a CPU the device's memory is the host's: all is in host_bytes."""

    name: str
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Phases of a run in order, the result, and what serving it takes.

    request: with nothing left open. stream: as for `TuneJob`. chosen: a sentence on what was left
    open, if not all of it is as usual. cuts: what a time limit leaves out.
    """

    request: "Request"
    activations: Literal["memory", "disk"]
    stream: bool
    chosen: str | None
    hindrances: tuple[str, ...]
    parameters: int
    blocks: int
    phases: tuple[Phase, ...]
    result: Result
    cache: CacheShape
    basis: str
    cuts: Cuts = field(default_factory=Cuts)

    @property
    def seconds(self) -> float:
        """Predicted time in all."""
        return sum(phase.seconds for phase in self.phases)

    def peak(self, what: Literal["device_bytes", "host_bytes", "disk_bytes"]) -> Phase:
        """The phase that needs most of something."""
        return max(self.phases, key=lambda phase: int(getattr(phase, what)))

    def within(self, seconds: float) -> "Plan":
        """The plan under a time limit, for which stages before PV-Tuning leave out what they must,
        and PV-Tuning has what is left.
        """
        times = {phase.name: phase.seconds for phase in self.phases}
        if PV_TUNING not in times:
            return self
        before = self.seconds - times[PV_TUNING]
        cuts = Cuts.of(seconds, before, times.get(SAMPLING, 0.0))
        left = max(0.0, seconds - cuts.work * before)

        def shorter(phase: Phase) -> Phase:
            if phase.name == PV_TUNING:
                return replace(phase, seconds=min(phase.seconds, left))
            return replace(phase, seconds=cuts.work * phase.seconds)

        return replace(self, phases=tuple(map(shorter, self.phases)), cuts=cuts)


@dataclass(frozen=True)
class Request:
    """What to plan: a run of `recipe` on a device ("cpu", "cuda" or "cuda:N").

    sampled: the model writes its own calibration text. gguf: the model is dequantised from a GGUF
    file. activations, stream: as for `TuneJob`. resumed: choices of the recipe are those of the run
    that goes on. calibrated: a checkpoint takes the place of calibration.
    """

    model: str
    recipe: Recipe
    device: str = "cpu"
    sampled: bool = True
    gguf: bool = False
    activations: Literal["auto", "memory", "disk"] = "auto"
    stream: bool = False
    resumed: bool = False
    calibrated: bool = False


class Planner:
    """Phases of a request whose scheme is known, as its choices would have them.

    host: bytes of host memory, which may keep the model's files.
    """

    def __init__(self, model: Any, request: Request, speed: Speed, host: int) -> None:
        self.config, self.request, self.speed = model.config, request, speed
        self.recipe, self.free = request.recipe, host
        self.cuda = request.device != "cpu"
        self.shape = shape = model_shape(model, self.recipe)
        self.result = result_of(model, self.recipe, shape)
        # A GGUF file stays in host memory, dequantised.
        self.host = PROCESS_BYTES + CUDA_HOST_BYTES * self.cuda
        self.host += TOKENIZER_BYTES * shape.vocabulary
        self.host += shape.itemsize * shape.parameters + GGUF_BYTES if request.gguf else 0

    def plan(self, phases: Sequence[Phase], **choices: Any) -> Plan:
        """A plan of these phases; choices: the fields of `Plan` that are chosen."""
        return Plan(
            parameters=self.shape.parameters,
            blocks=len(self.shape.blocks),
            phases=tuple(phases),
            result=self.result,
            cache=cache_shape(self.config),
            basis=self.speed.basis,
            **choices,
        )

    def original(self, stream: bool) -> int:
        """Numbers of the original model that are in memory when all of it computes."""
        blocks = [block.parameters for block in self.shape.blocks]
        return self.shape.parameters - (sum(blocks) - max(blocks)) * stream

    def streaming_seconds(self, item: int, passes: int) -> float:
        """Time in which all blocks come from the host so many times."""
        blocks = self.shape.parameters - self.shape.outside
        size, bus = item * blocks, self.speed.bus
        kept = self.request.gguf or self.free - self.host > size
        return size * passes / (bus if kept else min(bus, READ_SPEED))

    def phase(
        self, name: str, device: int, seconds: float, *, host: int = 0, disk: int = 0
    ) -> Phase:
        """A phase whose working memory is on the device, which on a CPU is the host."""
        if self.cuda:
            return Phase(name, device + CUDA_DEVICE_BYTES, self.host + host, disk, seconds)
        return Phase(name, 0, self.host + host + device, disk, seconds)

    def sampling(self, *, stream: bool) -> Phase:
        """The whole model writes text, some windows at once."""
        windows = Windows(self.recipe.windows, self.recipe.length, self.recipe.seed)
        item = self.shape.itemsize if self.cuda else host_dtype(self.shape.itemsize).itemsize
        peak = sampled.peak_bytes(self.config, windows, self.original(stream), item)
        rows = sampled.rows_at_once(self.config, windows.count, windows.length)
        seconds = self.speed.sampling_seconds(self.shape, self.recipe, item, rows)
        passes = windows.length * ceil(windows.count / rows)
        seconds += self.streaming_seconds(item, passes) * stream
        return self.phase(SAMPLING, peak, seconds)

    def block_phases(self, activations: Literal["memory", "disk"]) -> Iterator[Phase]:
        """One pass over the blocks, as its three parts; each is the peak over all blocks. None
        where a checkpoint takes their place.
        """
        if self.request.calibrated:
            return
        recipe, model = self.recipe, self.shape
        blocks, scheme, device = model.blocks, recipe.parsed_scheme, self.request.device
        batch = batch_size(recipe.samples, recipe.length) * recipe.length
        # What enters the block at hand, and what its dense original makes of it.
        streams = 2 * store_bytes((recipe.samples, recipe.length, model.width))
        kept = streams if activations == "memory" else 0
        place = {"host": kept, "disk": model.stored + streams - kept}
        passes = max(observe_bytes(block, batch, model.width) for block in blocks)
        # On a CPU embeddings are read where the file is mapped.
        start = stage.start_bytes(model, batch) if self.cuda else 0
        item = compute_dtype(recipe.finetune.compute, device).itemsize
        seconds = self.speed.pass_seconds(model, recipe, item)
        yield self.phase("block pass", max(passes, start), seconds, **place)
        fits = max(
            4 * block.parameters
            + block.moments
            + max(layer.peak_bytes(shape, scheme, recipe.fit, device) for shape in block.linears)
            for block in blocks
        )
        layers = [shape for block in blocks for shape in block.linears]
        seconds = sum(self.speed.fit_seconds(*shape, recipe) for shape in layers)
        yield self.phase("layer fit", fits, seconds, **place)
        tuning = block_tuning.peak_bytes(model, recipe, batch, item, device)
        seconds = self.speed.tuning_seconds(model, recipe, item)
        yield self.phase("block fine-tune", tuning, seconds, **place)
        if model.ends:
            peak = max(
                ends.peak_bytes(table, recipe.fit, model.itemsize, device) for table in model.ends
            )
            seconds = sum(self.speed.table_seconds(table, recipe) for table in model.ends)
            yield self.phase("embedding fit", peak, seconds, **place)

    def pv(self, recipe: Recipe, *, stream: bool) -> Phase:
        """PV-Tuning by a settled recipe: the whole student, and the original model unless it goes
        first.
        """
        model, training = self.shape, recipe.training
        assert training is not None
        item = self.compute_bytes
        student = trainer.peak_bytes(model, recipe, item, self.request.device)
        own = model.itemsize if self.cuda else item
        original = self.original(stream)
        teacher = loss.teacher_bytes(model, recipe.length, own, original)
        # At work the student needs more than the teacher, which waits for it or is gone.
        waiting = own * (loss.head_weights(model) if training.teacher_first else original)
        at_hand, states = loss.states_bytes(model, recipe)
        seconds = self.speed.pv_seconds(model, recipe, item)
        seconds += self.streaming_seconds(own, loss.passes(recipe)) * stream
        # Best student and snapshot are complete before older ones go, and OUT can be served.
        disk = 3 * model.stored + states + self.result.file_bytes
        if training.snapshots:
            disk += 2 * self.snapshot_bytes(recipe)
            looks = training.steps // training.evaluate_every
            one = self.snapshot_bytes(recipe) / DISK_SPEED
            seconds += min(looks * one, one + seconds / trainer.SNAPSHOT_SPACING)
        host = at_hand
        if training.states == "host":
            host += optimizer.streamed_bytes(model, recipe.pv, item)
        peak = max(student + waiting, teacher)
        return self.phase(PV_TUNING, peak, seconds, host=host, disk=disk)

    @property
    def compute_bytes(self) -> int:
        """Of a number that the student computes with."""
        training = self.recipe.training
        assert training is not None
        return compute_dtype(training.compute, self.request.device).itemsize

    def snapshot_bytes(self, recipe: Recipe) -> int:
        """All that a step of PV-Tuning needs, on disk."""
        assert recipe.training is not None
        trained = self.shape.trained(embeddings=not recipe.training.freeze_embeddings)
        latents = optimizer.latent_bytes(self.shape, recipe.pv)
        return optimizer.state_bytes(self.shape, trained) + latents

    def write(self) -> Phase:
        """The checkpoint beside the pieces it is made of."""
        size = self.result.file_bytes
        peak = write_checkpoint.peak_bytes(self.shape, self.recipe)
        disk = size + self.shape.stored
        return self.phase("write", 0, size / DISK_SPEED, host=peak, disk=disk)
