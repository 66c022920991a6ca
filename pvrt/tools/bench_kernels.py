"""Measuring GPU kernels: `pvrt bench kernels`, and with --tune the table that serving then uses.

Every time is that of CUDA graphs over several copies of a weight, together larger than the L2
cache, as in a model whose layers follow each other; the median of repeats. What is measured here
is written to the user's table (`pvrt_kernels.gpu.choose.user_table`); nothing measures while
serving.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pvrt.errors import RunError
from pvrt.format.aqlm import Checkpoint
from pvrt.format.atomic import as_json, try_writing, write_synced
from pvrt.format.scheme import Scheme
from pvrt_kernels.gpu import choose, launch
from pvrt_kernels.gpu.choose import DENSE, Gpu, LaunchConfig, Shape
from pvrt_kernels.gpu.layout import split_codebooks
from pvrt_kernels.packed import PackedWeight

COLD_BYTES = 256 << 20  # more than any L2 cache holds
COMMON_LAYERS = (
    *((4096, 4096), (6144, 4096), (12288, 4096), (22016, 4096), (28672, 4096)),
    *((4096, 11008), (4096, 14336)),
)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Timing:
    """Seconds of one product, and of the same with a dense weight in cuBLAS."""

    config: LaunchConfig
    seconds: float
    dense_seconds: float


class Clock:
    """Times calls on a device. On a CPU (tests, dry runs) every call just runs once."""

    def __init__(self, device: torch.device, repeats: int = 15) -> None:
        self.device, self.repeats = device, repeats

    def time(self, calls: Sequence[Callable[[], object]]) -> float:
        """Median seconds of one call; all are different weights, run one after the other."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - started) / len(calls)
        replay = graph(calls)
        timed: Any = torch.cuda.Event
        events = [timed(enable_timing=True) for _ in range(2 * self.repeats)]
        for _ in range(3):
            replay()
        for begin, end in zip(events[::2], events[1::2], strict=True):
            begin.record()
            replay()
            end.record()
        torch.cuda.synchronize(self.device)
        pairs = zip(events[::2], events[1::2], strict=True)
        milliseconds: float = median(begin.elapsed_time(end) for begin, end in pairs)
        return milliseconds / 1000 / len(calls)


def graph(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """A CUDA graph of some calls, warmed up; returns its replay."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles what is not yet
            call()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()
    return captured.replay


def random_layer(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, uniformly random, codebooks [M, 2^B, 1, g] and scales [out] of a layer."""
    scheme = Scheme.parse(shape.scheme)
    codes = torch.randint(
        0, shape.size, scheme.codes_shape(shape.out_features, shape.in_features), device=device
    )
    codebooks = torch.randn(scheme.codebooks_shape, dtype=dtype, device=device)
    scales = torch.full((shape.out_features,), shape.in_features**-0.5, dtype=dtype, device=device)
    return codes.to(scheme.code_dtype), codebooks, scales


def random_packed(shape: Shape, dtype: torch.dtype, device: torch.device) -> PackedWeight:
    """Such a layer packed for a GPU, as one partition."""
    (codes, codebooks, scales), sizes = random_layer(shape, dtype, device), [shape.out_features]
    tensors = launch.pack(codes, codebooks.unsqueeze(0), scales, sizes)
    return PackedWeight(launch.KERNEL.name, tensors, sizes, shape.in_features)


def weight_copies(
    weight: PackedWeight, limit: int = 64, cache_bytes: int = COLD_BYTES
) -> list[PackedWeight]:
    """Copies of a weight, larger together than a cache."""
    layout: Any = type(weight.tensors)
    codes = weight.tensors[0]  # of every layout
    count = min(max(2, -(-cache_bytes // codes.nbytes)), limit)
    return [
        replace(weight, tensors=layout(*(tensor.clone() for tensor in weight.tensors)))
        for _ in range(count)
    ]


def blocks_of(weight: PackedWeight) -> launch.GpuBlocks:
    """The tensors of a weight that was packed for a GPU."""
    assert isinstance(weight.tensors, launch.GpuBlocks), weight.kernel
    return weight.tensors


def time_config(
    clock: Clock, config: LaunchConfig, x: Tensor, copies: Iterable[PackedWeight]
) -> float:
    """Seconds of x times the weight with a launch config."""

    def call(weight: PackedWeight) -> Callable[[], Tensor]:
        tensors, sizes = blocks_of(weight), weight.partition_sizes
        if config.kernel == "dense":
            return lambda: launch.multiply_decoded(x, tensors, None, sizes)
        return lambda: launch.launch(config, x, tensors, None, sizes)

    return clock.time([call(weight) for weight in copies])


def time_dense(clock: Clock, x: Tensor, shape: Shape) -> float:
    """Seconds of x times a dense weight of the same shape and type as x, in cuBLAS."""
    size = shape.out_features * shape.in_features * x.element_size()
    count = min(max(2, -(-COLD_BYTES // size)), 64)
    weight = torch.randn(shape.out_features, shape.in_features, device=x.device).to(x.dtype)
    copies = [weight.clone() for _ in range(count)]
    return clock.time([lambda w=w: F.linear(x, w) for w in copies])  # type: ignore[misc]


def candidates(card: Gpu, shape: Shape, tokens: int) -> list[LaunchConfig]:
    """At most about a dozen launch configs worth measuring, which hardly spill registers."""
    found = []
    if tokens <= 4 and choose.takes("lut_cuda", card, shape):
        largest = 4 if tokens == 1 else 2
        base = choose.fit(LaunchConfig("lut_cuda", 0, 256 * largest, 8, 0), card, shape, tokens)
        found.append(base)
        for rows in (256, 512, 1024)[:largest]:
            tiles, stages = -(-shape.out_features // rows), -(-shape.blocks // 2)
            for per_sm in (1, 2, 3):
                steps = -(-stages // max(1, min(stages, round(per_sm * card.sms / tiles))))
                found.append(replace(base, rows=rows, split=-(-stages // steps)))
    elif tokens == 1 and shape.width == "8bit":
        whole = not split_codebooks(shape.num_codebooks)[1]
        sizes = ((512, 4), (1024, 8), (512, 8), (2048, 16), (1024, 16))
        for rows, warps in sizes if whole else ((512, 8), (1024, 16)):
            found.append(choose.fit(LaunchConfig("lut", 0, rows, warps, 0), card, shape, tokens))
        for split in (max(1, found[1].split // 2), min(shape.blocks, found[1].split * 2)):
            found.append(replace(found[1], split=split))
    if tokens <= 4:
        found.append(choose.fit(LaunchConfig("direct", 0, 128, 4, 0), card, shape, tokens))
    if tokens <= 16:
        found.append(choose.fit(LaunchConfig("tile", 0, 128, 4, 0), card, shape, tokens))
    if 4 < tokens <= choose.MOST_TOKENS and choose.takes("tile_cuda", card, shape):
        base = choose.fit(LaunchConfig("tile_cuda", 0, 256, 8, 0), card, shape, tokens)
        found.append(base)
        for rows in (128, 256, 512):
            found += [replace(base, rows=rows, split=split) for split in (1, 2)]
    if tokens > 4:
        found.append(choose.fit(LaunchConfig("tile", 0, 128, 8, 0), card, shape, tokens))
        found.append(DENSE)
    return list(dict.fromkeys(found))


def measure_layer(
    shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, tune: bool
) -> list[Timing]:
    """Times of a layer: of its launch config, or of all candidates, fastest first."""
    clock, card = Clock(device), choose.describe_gpu(device)
    chosen = choose.choose(card, shape, tokens, dtype, False)
    copies = weight_copies(random_packed(shape, dtype, device))
    x = torch.randn(tokens, shape.in_features, dtype=dtype, device=device)
    dense = time_dense(clock, x, shape)
    tried = list(dict.fromkeys([chosen, *candidates(card, shape, tokens)])) if tune else [chosen]
    timings = [Timing(config, time_config(clock, config, x, copies), dense) for config in tried]
    return sorted(timings, key=lambda timing: timing.seconds)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of copies on the device."""
    source = torch.zeros(1 << 28 if device.type == "cuda" else 1 << 16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / Clock(device).time([lambda: target.copy_(source)])


def fused_layers(checkpoint: Checkpoint) -> list[Shape]:
    """Shapes of a checkpoint's layers as backends run them: q, k and v in one, gate and up."""
    outs: dict[tuple[str, str, Scheme], int] = {}
    ins: dict[tuple[str, str, Scheme], int] = {}
    for name, layer in checkpoint.layers.items():
        parent, _, last = name.rpartition(".")
        fused = "qkv" if last in _QKV else "gate_up" if last in _GATE_UP else last
        assert isinstance(layer.scheme, Scheme)
        key = (parent, fused, layer.scheme)
        outs[key] = outs.get(key, 0) + layer.out_features
        ins[key] = layer.in_features
    return list(dict.fromkeys(Shape(*_numbers(key[2]), outs[key], ins[key]) for key in outs))


def _numbers(scheme: Scheme) -> tuple[int, int, int]:
    return scheme.num_codebooks, scheme.codebook_size, scheme.in_group_size


def common_layers(scheme: str) -> list[Shape]:
    """Fused layers of Llama 2 7B and Llama 3 8B. Raises RunError for a malformed scheme."""
    try:
        form = Scheme.parse(scheme)
    except ValueError as error:
        raise RunError(str(error)) from error
    return [Shape(*_numbers(form), out, inputs) for out, inputs in COMMON_LAYERS]


def rules_of(best: dict[tuple[Shape, int], LaunchConfig]) -> list[dict[str, Any]]:
    """Rules of a table: for every layer and measured number of tokens the fastest launch config."""
    rules = []
    for shape, tokens in sorted(best, key=lambda key: (str(key[0]), key[1])):
        config = best[shape, tokens]
        rule: dict[str, Any] = {
            "scheme": shape.scheme,
            "layer": [shape.out_features, shape.in_features],
        }
        rule |= {"max_tokens": tokens, "kernel": config.kernel}
        if config != DENSE:
            rule |= {"rows": config.rows, "warps": config.warps, "split": config.split}
        rules.append(rule)
    return rules


def run(path: Path | None, scheme: str, tune: bool, say: Callable[[str], None]) -> list[Any]:
    """`pvrt bench kernels`: measure the layers of a checkpoint (or common ones), maybe tune.

    Returns one record per layer and number of tokens. Raises RunError without a GPU,
    and where the table of --tune could not be written.
    """
    if not torch.cuda.is_available():
        raise RunError("pvrt bench kernels measures an NVIDIA GPU, and torch finds none here")
    device = torch.device("cuda")
    card, bandwidth = choose.describe_gpu(device), copy_bandwidth(device)
    if tune:
        check_table(card)
    layers = common_layers(scheme) if path is None else fused_layers(Checkpoint.open(path))
    say(f"{card.name}: copies at {bandwidth / 1e9:.0f} GB/s")
    say(f"{'layer':>14} tokens  {'kernel':36} {'us':>8} {'GB/s':>6} of copy over dense")
    records: list[dict[str, Any]] = []
    best: dict[tuple[Shape, int], LaunchConfig] = {}
    started = time.monotonic()
    for shape in layers:
        for tokens in TOKENS:
            fastest = measure_layer(shape, tokens, torch.float16, device, tune)[0]
            best[shape, tokens] = fastest.config
            records.append({**asdict(shape), "tokens": tokens, **asdict(fastest)})
            left = len(layers) * len(TOKENS) - len(records)
            eta = (time.monotonic() - started) / len(records) * left
            say(f"{_line(shape, tokens, fastest, bandwidth)}  ETA {eta:.0f} s")
    if tune:
        say(f"written: {store(card, best)}")
    return records


def _line(shape: Shape, tokens: int, timing: Timing, bandwidth: float) -> str:
    config = timing.config
    tile = f" rows{config.rows} warps{config.warps} split{config.split}" if config != DENSE else ""
    rate = shape.blocks * 16 * shape.out_features / timing.seconds
    return (
        f"{shape.out_features:>6} x {shape.in_features:<5} {tokens:>6}  {config.kernel + tile:36} "
        f"{timing.seconds * 1e6:8.1f} {rate / 1e9:6.0f} {rate / bandwidth:7.0%} "
        f"{timing.dense_seconds / timing.seconds:9.2f}x"
    )


def check_table(card: Gpu) -> None:
    """Raise RunError where `store` could not write: asked before minutes of measuring."""
    folder = choose.user_table(card.name).parent
    try:
        try_writing(folder)
    except OSError as error:
        raise RunError(f"cannot write the card's table to {folder} ({error})") from error


def store(card: Gpu, best: dict[tuple[Shape, int], LaunchConfig]) -> Path:
    """Write the user's table for a card; what it says of other layers is kept."""
    file = choose.user_table(card.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    own = choose.read_table(file) if file.is_file() else None
    new = rules_of(best)
    measured = [(rule["scheme"], rule["layer"]) for rule in new]
    before = own["rules"] if own else []
    kept = [rule for rule in before if (rule.get("scheme"), rule.get("layer")) not in measured]
    table = {
        "version": choose.VERSION,
        "names": [card.name],
        "measured": True,
        "basis": f"pvrt bench kernels --tune, torch {torch.__version__}",
        "rules": [*new, *kept],
    }
    staged = file.with_suffix(".tmp")
    write_synced(staged, as_json(table))
    staged.replace(file)
    return file
