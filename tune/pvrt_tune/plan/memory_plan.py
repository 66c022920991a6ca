"""What a tuning run will need and give, before a byte of weights is read: `pvrt plan MODEL`.

Everything is arithmetic on the shapes of the model's skeleton. Memory of a stage is counted in the
tensors that are alive at its peak; the factors of layer fits and block fine-tuning were counted on
real runs, storage by storage (for layer fits a test counts again), and benchmarks/plan.py compares
the result with the resident memory of whole runs. What is counted is memory that the run itself
must have: pages of mapped model files come on top where there is room, and go when there is none.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal

import torch
from torch import nn

from pvrt.format.scheme import Scheme
from pvrt.kv_cache import CacheShape, cache_shape
from pvrt.modules.experts import ExpertList
from pvrt_tune.data.text import rows_at_once
from pvrt_tune.fit.grid import GridLinear
from pvrt_tune.fit.layer import empty_like
from pvrt_tune.machine import Machine, compute_dtype
from pvrt_tune.model_blocks import BlockList, batch_size, find_blocks, linears
from pvrt_tune.plan.pv import Sizes, needs
from pvrt_tune.plan.speed import Speed
from pvrt_tune.settings import Recipe

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


@dataclass(frozen=True)
class Phase:
    """Peak need of one stage. On a CPU the device's memory is the host's: all is in host_bytes."""

    name: str
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """The checkpoint: bytes of its tensors, and bits per weight over linears and over all."""

    file_bytes: int
    bits_per_weight_linears: float
    bits_per_weight_file: float
    dense_model_bytes: int


@dataclass(frozen=True)
class Plan:
    """Phases of a run in order, the result, and what serving it takes."""

    request: "Request"
    activations: Literal["memory", "disk"]
    parameters: int
    blocks: int
    phases: tuple[Phase, ...]
    result: Result
    cache: CacheShape
    basis: str

    @property
    def seconds(self) -> float:
        """Predicted time in all."""
        return sum(phase.seconds for phase in self.phases)

    def peak(self, what: Literal["device_bytes", "host_bytes", "disk_bytes"]) -> Phase:
        """The phase that needs most of something."""
        return max(self.phases, key=lambda phase: int(getattr(phase, what)))

    def within(self, seconds: float) -> "Plan":
        """The plan under a time limit, which shortens PV-Tuning and nothing else."""
        pv = next((phase for phase in self.phases if phase.name == "PV-Tuning"), None)
        if pv is None:
            return self
        left = max(0.0, seconds - (self.seconds - pv.seconds))
        short = replace(pv, seconds=min(pv.seconds, left))
        return replace(self, phases=tuple(short if p is pv else p for p in self.phases))


@dataclass(frozen=True)
class BlockShape:
    """What the memory and time of one block depend on.

    linears: (out, in) of every layer to quantise. inputs: widths of the distinct inputs that they
    read. read, written, active: widths read and written and weights used by one token, which passes
    only some of a block's experts. widest: summed outputs of the widest group of sibling layers
    without its last. norms: summed sizes of one-dimensional weights. quantised: bytes of the
    quantised block on disk.
    """

    parameters: int
    linears: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]
    read: float
    written: float
    active: float
    widest: int
    norms: int
    quantised: int

    @property
    def moments(self) -> int:
        """Bytes of all input second moments."""
        return 4 * sum(width**2 for width in self.inputs)


def block_shape(block: nn.Module, recipe: Recipe, experts_per_token: int = 1) -> BlockShape:
    """Shapes of a skeleton's block."""
    siblings: dict[str, list[nn.Linear]] = {}
    for name, linear in linears(block):
        siblings.setdefault(name.rpartition(".")[0], []).append(linear)
    # The share of tokens that pass a layer.
    share = {
        f"{name}.{index}": experts_per_token / len(list(module.children()))
        for name, module in block.named_modules()
        if isinstance(module, ExpertList)
        for index, _ in module.named_children()
    }
    inputs: list[int] = []
    read = written = 0.0
    passive = 0.0
    for name, layers in siblings.items():
        widths = [layer.in_features for layer in layers]
        # The last of several (the output projection) reads what the others made.
        own = [*set(widths), *([widths[-1]] if widths.count(widths[-1]) > 1 else [])]
        inputs += own
        read += share.get(name, 1) * sum(own)
        written += share.get(name, 1) * sum(layer.out_features for layer in layers)
        passive += (1 - share.get(name, 1)) * sum(layer.weight.numel() for layer in layers)
    norms = sum(p.numel() for n, p in block.named_parameters() if p.dim() == 1 and "weight" in n)
    parameters = sum(p.numel() for p in block.parameters())
    return BlockShape(
        parameters=parameters,
        linears=tuple((layer.out_features, layer.in_features) for _, layer in linears(block)),
        inputs=tuple(inputs),
        read=read,
        written=written,
        active=parameters - passive,
        widest=max(sum(layer.out_features for layer in part[:-1]) for part in siblings.values()),
        norms=norms,
        quantised=_stored(block, recipe),
    )


def _stored(block: nn.Module, recipe: Recipe) -> int:
    """Bytes of a block's tensors once quantised."""
    size = sum(_bytes(parameter) for parameter in block.parameters())
    for linear, module in _quantised(block, recipe):
        size += sum(_bytes(p) for p in module.parameters())
        size -= sum(_bytes(p) for p in linear.parameters())
    return size


def _quantised(block: nn.Module, recipe: Recipe) -> Iterator[tuple[nn.Linear, nn.Module]]:
    """Every layer to quantise, and its quantised module on the meta device."""
    with torch.device("meta"):
        for _, linear in linears(block):
            yield linear, empty_like(linear, recipe.parsed_scheme, linear.weight.dtype)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ---- memory ----


def fit_bytes(out: int, in_features: int) -> int:
    """Peak of one layer's fit beyond its weight and moment: k-means over all groups of weights, or
    the factors of H.
    """
    weight, moment = 4 * out * in_features, 4 * in_features**2
    return max(6 * weight + 2 * moment + 2_000_000, int(2.5 * weight) + 6 * moment)


def observe_bytes(shape: BlockShape, tokens: int, width: int) -> int:
    """Peak of one forward pass that keeps the inputs of all linears, and of the moments."""
    return shape.moments + int(4 * tokens * (2 * width + shape.read + shape.widest))


def finetune_bytes(shape: BlockShape, tokens: int) -> int:
    """Peak of fine-tuning: the quantised block, one decoded layer with what decoding takes, and
    what the backward pass needs of `tokens` tokens.
    """
    largest = max(4 * out * inputs for out, inputs in shape.linears)
    kept = shape.read + shape.written + 1.4 * shape.widest + 2 * shape.norms
    return int(shape.quantised + 6 * largest + 4 * tokens * kept)


@dataclass(frozen=True)
class Request:
    """What to plan: a run of `recipe` on a device ("cpu", "cuda" or "cuda:N").

    sampled: the model writes its own calibration text. gguf: the model is dequantised from a GGUF
    file. activations: as for `TuneJob`.
    """

    model: str
    recipe: Recipe
    device: str = "cpu"
    sampled: bool = True
    gguf: bool = False
    activations: Literal["auto", "memory", "disk"] = "auto"


def plan_run(model: Any, request: Request, speed: Speed, machine: Machine) -> Plan:
    """Plan a run over a skeleton; "auto" keeps activations in memory if the machine has it.

    Raises SourceError when the model has no blocks.
    """
    kept: Literal["memory", "disk"] = "disk" if request.activations == "disk" else "memory"
    plan = _Planner(model, request, speed, kept).plan()
    if request.activations == "auto" and plan.peak("host_bytes").host_bytes > machine.host:
        return _Planner(model, request, speed, "disk").plan()
    return plan


class _Planner:
    def __init__(
        self, model: Any, request: Request, speed: Speed, activations: Literal["memory", "disk"]
    ) -> None:
        self.model, self.request, self.speed = model, request, speed
        self.recipe, self.activations = request.recipe, activations
        self.blocks: BlockList = find_blocks(model)
        tied = set(model.all_tied_weights_keys)
        named = model.named_parameters(remove_duplicate=False)
        stored = {key: parameter for key, parameter in named if key not in tied}
        inside = f"{self.blocks.name}."
        self.stored = list(stored.values())
        self.outside = [p for key, p in stored.items() if not key.startswith(inside)]
        self.parameters = sum(parameter.numel() for parameter in self.stored)
        self.itemsize = model.dtype.itemsize
        self.width = model.config.get_text_config().hidden_size
        routed = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
        self.shapes = [block_shape(block, self.recipe, routed) for block in self.blocks.blocks]
        self.cuda = request.device != "cpu"
        # A GGUF file stays in host memory, dequantised.
        self.host = PROCESS_BYTES + CUDA_HOST_BYTES * self.cuda
        self.host += TOKENIZER_BYTES * model.config.get_text_config().vocab_size
        self.host += self.itemsize * self.parameters + GGUF_BYTES if request.gguf else 0

    def plan(self) -> Plan:
        first = [self.sampling()] if self.request.sampled else []
        return Plan(
            self.request,
            self.activations,
            self.parameters,
            len(self.shapes),
            (*first, *self.block_phases(), *self.pv(), self.write()),
            self.result(),
            cache_shape(self.model.config),
            self.speed.basis,
        )

    def phase(
        self, name: str, device: float, seconds: float, *, host: float = 0, disk: float = 0
    ) -> Phase:
        """A phase whose working memory is on the device, which on a CPU is the host."""
        if self.cuda:
            return Phase(
                name, int(device) + CUDA_DEVICE_BYTES, int(self.host + host), int(disk), seconds
            )
        return Phase(name, 0, int(self.host + host + device), int(disk), seconds)

    def sampling(self) -> Phase:
        """The whole model writes text, some windows at once."""
        recipe, config = self.recipe, self.model.config
        item = self.itemsize if self.cuda else 4
        rows = rows_at_once(config, recipe.windows, recipe.length)
        cache = rows * cache_shape(config, item).bytes_for(recipe.length)
        scores = rows * config.get_text_config().vocab_size * (item + 3 * 4)
        step = max(
            item * self.parameters / self.speed.memory,
            2.0 * rows * self.parameters / self.speed.products,
        )
        steps = recipe.length * ceil(recipe.windows / rows)
        return self.phase("sampling", item * self.parameters + cache + scores, steps * step)

    def block_phases(self) -> Iterator[Phase]:
        """One pass over the blocks, as its three parts; each is the peak over all blocks."""
        recipe, shapes, speed = self.recipe, self.shapes, self.speed
        tokens = recipe.samples * recipe.length
        batch = batch_size(recipe.samples) * recipe.length
        # What enters the block at hand, and what its dense original makes of it.
        streams = 2 * 4 * tokens * self.width
        kept = streams if self.activations == "memory" else 0
        disk = sum(shape.quantised for shape in shapes) + streams - kept
        passes = 3 if recipe.targets == "original" else 2
        ahead = sum(
            2.0 * tokens * (passes * shape.active + sum(width**2 for width in shape.inputs))
            for shape in shapes
        )
        embeddings = max(_bytes(p) for p in self.outside) * self.cuda
        forward = max(
            4 * shape.parameters + observe_bytes(shape, batch, self.width) for shape in shapes
        )
        place = {"host": kept, "disk": disk}
        yield self.phase("block pass", max(forward, embeddings), ahead / speed.products, **place)
        fit = max(
            4 * shape.parameters + shape.moments + max(fit_bytes(*layer) for layer in shape.linears)
            for shape in shapes
        )
        seconds = sum(speed.fit_seconds(*layer, recipe) for s in shapes for layer in s.linears)
        yield self.phase("layer fit", fit, seconds, **place)
        tuning = max(finetune_bytes(shape, batch) for shape in shapes)
        share = 1 - recipe.finetune.held_out
        rounds = recipe.finetune.epochs * (3 * share + recipe.finetune.held_out)
        work = sum(2.0 * tokens * rounds * shape.active for shape in shapes)
        yield self.phase("block fine-tune", tuning, work / speed.products, **place)

    def pv(self) -> Iterator[Phase]:
        """PV-Tuning: the whole student, and the original model unless it goes first."""
        recipe, shapes = self.recipe, self.shapes
        training = recipe.training
        if training is None:
            return
        one = [s.read + s.written + 1.4 * s.widest + 2 * s.norms for s in shapes]
        config = self.model.config.get_text_config()
        layers = [out * inputs for shape in shapes for out, inputs in shape.linears]
        scheme = recipe.parsed_scheme
        sizes = Sizes(
            quantised=sum(layers),
            groups=sum(layers) // scheme.in_group_size if isinstance(scheme, Scheme) else 0,
            parameters=self.parameters,
            outside=sum(parameter.numel() for parameter in self.outside),
            vocabulary=config.vocab_size,
            width=self.width,
            largest=max(layers),
            stored=sum(shape.quantised for shape in shapes),
            blocks=len(shapes),
            kept=sum(one),
            kept_by_one=max(one),
        )
        item = compute_dtype(training.compute, self.request.device).itemsize
        original = self.itemsize if self.cuda else item
        needed = needs(sizes, recipe, item, original)
        both = needed.student + needed.original
        peak = max(needed.student, needed.original) if training.teacher_first else both
        place = {"host": needed.states, "disk": needed.disk + sizes.stored}
        yield self.phase("PV-Tuning", peak, needed.operations / self.speed.products, **place)

    def write(self) -> Phase:
        """The checkpoint beside the pieces it is made of; tensors are written from mapped files."""
        size = self.result().file_bytes
        pieces = sum(shape.quantised for shape in self.shapes)
        return self.phase("write", 0, size / DISK_SPEED, disk=size + pieces)

    def result(self) -> Result:
        dense = sum(_bytes(parameter) for parameter in self.stored)
        size = sum(_bytes(parameter) for parameter in self.outside)
        size += sum(shape.quantised for shape in self.shapes)
        scheme = self.recipe.parsed_scheme
        bits = weights = 0
        for block in self.blocks.blocks:
            for linear, module in _quantised(block, self.recipe):
                shape = linear.out_features, linear.in_features
                bits += scheme.layer_bits(*shape, 8 * linear.weight.element_size())
                weights += linear.weight.numel()
                if isinstance(module, GridLinear):
                    size += module.packed_bytes - sum(_bytes(p) for p in module.parameters())
        return Result(size, bits / weights, 8 * size / self.parameters, dense)
