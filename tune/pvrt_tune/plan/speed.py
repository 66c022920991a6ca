"""How long fits and passes take: operation counts, and this device's rates measured in a second."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import ceil

import torch
from torch import nn

from pvrt.format.scheme import GridScheme
from pvrt_tune.distil.loss import windows_seen
from pvrt_tune.fit.codebooks import codewords_scored, searched_together
from pvrt_tune.fit.layer import quantize_linear
from pvrt_tune.fit.nearest_sums import BEAM
from pvrt_tune.fit.table import FITTED_ON
from pvrt_tune.machine import compute_dtype
from pvrt_tune.model_blocks import batch_size
from pvrt_tune.pv.optimizer import latent_bytes
from pvrt_tune.settings import Recipe
from pvrt_tune.shapes import ModelShape, TableShape


@dataclass(frozen=True)
class Speed:
    """Rates of a device: products in float32 and code search in operations per second (counted as
    `fit_products` and `fit_search` do); products in the 16-bit type that it computes in, if it
    does; memory in bytes read per second, and the bus from and to the host (each way). `basis`:
    whence.
    """

    products: float
    half: float
    search: float
    memory: float
    bus: float
    basis: str

    def fit_seconds(self, out: int, in_features: int, recipe: Recipe) -> float:
        """Time to quantise one linear layer."""
        shape = (out, in_features, recipe)
        return fit_products(*shape) / self.products + fit_search(*shape) / self.search

    def table_seconds(self, table: TableShape, recipe: Recipe) -> float:
        """Fitting an embedding: codebooks on some rows, codes of all."""
        rows, width = table.rows, table.width
        whole = replace(recipe, scheme=str(table.scheme))
        again = replace(recipe.fit, rounds=1, kmeans_iterations=1, beam=1, cg_iterations=1)
        codes = self.fit_seconds(rows, width, replace(whole, fit=again))
        return self.fit_seconds(min(rows, FITTED_ON), width, whole) + codes

    def sampling_seconds(self, model: ModelShape, recipe: Recipe, item: int, rows: int) -> float:
        """Time in which the model writes all windows, `rows` at once, with numbers of `item` bytes
        that are in memory.
        """
        read = item * model.parameters / self.memory
        step = max(read, 2.0 * rows * model.parameters / self.rate(item))
        return recipe.length * ceil(recipe.windows / rows) * step

    def rate(self, itemsize: int) -> float:
        """Products per second in numbers of so many bytes."""
        return self.half if itemsize == 2 else self.products

    def pass_seconds(self, model: ModelShape, recipe: Recipe, itemsize: int) -> float:
        """Time of all blocks' forward passes with numbers of `itemsize` bytes, and of their inputs'
        second moments in float32.
        """
        passes = 3 if recipe.targets == "original" else 2
        seconds = passes * sum(block.active for block in model.blocks) / self.rate(itemsize)
        seconds += sum(width**2 for b in model.blocks for width in b.inputs) / self.products
        return 2.0 * recipe.samples * recipe.length * seconds

    def tuning_seconds(self, model: ModelShape, recipe: Recipe, itemsize: int) -> float:
        """Time to tune all blocks, with numbers of `itemsize` bytes where codes move."""
        settings = recipe.settled.finetune
        rounds = settings.epochs * (3 * (1 - settings.held_out) + settings.held_out)
        work = rounds * sum(block.active for block in model.blocks)
        moves = bool(settings.move_codes)
        rate = self.rate(itemsize) if moves else self.products
        seconds = 2.0 * recipe.samples * recipe.length * work / rate
        batch = batch_size(recipe.samples, recipe.length)
        steps = settings.epochs * (1 - settings.held_out) * recipe.samples / batch
        weights = sum(block.weights for block in model.blocks)
        return seconds + moves * steps * weights * _STEP_BYTES / self.memory

    def pv_seconds(self, model: ModelShape, recipe: Recipe, itemsize: int) -> float:
        """Time of PV-Tuning: the original model's pass, steps, and looks at held-out text; the
        student computes in `itemsize` bytes a number.
        """
        settings = recipe.settled.training
        assert settings is not None and settings.microbatch is not None
        blocks, head = model.parameters - model.outside, model.vocabulary * model.width
        seen = settings.steps * settings.batch
        looks = settings.steps // settings.evaluate_every + 1
        passes = 4 if settings.recompute_activations else 3
        work = (
            windows_seen(recipe) * blocks
            + seen * (passes * blocks + 3 * head)
            + looks * settings.held_out * (blocks + 2 * head)
        )
        seconds = 2.0 * recipe.length * work / self.rate(itemsize)
        weights = sum(block.weights for block in model.blocks)
        seconds += settings.steps * weights * _STEP_BYTES / self.memory
        if settings.states == "host":
            # Gradients come once and go twice, and twice more for every further pass. States come
            # and go.
            parts = ceil(settings.batch / settings.microbatch)
            moved = (3 + 2 * (parts - 1)) * itemsize * weights + 2 * latent_bytes(model, recipe.pv)
            seconds += settings.steps * moved / self.bus
        return seconds


#: What a step reads and writes per weight, about: decoding twice, pulling gradients back, a step of
#: Adam's kind in float32, and the search for codes.
_STEP_BYTES = 80

# What is measured: a square matrix, and outputs and inputs of a layer. On a CPU the layer has the
# size of SmolLM2's; a GPU needs a larger one to be busy.
_CPU_SIZES, _GPU_SIZES = (768, 768, 384), (4096, 2048, 2048)


def fit_products(out: int, in_features: int, recipe: Recipe) -> float:
    """Operations in products with H of one layer's fit: conjugate gradients, scales, sweeps, and
    the factors of H.
    """
    settings = recipe.fit
    full = (settings.rounds + 1) * (settings.cg_iterations + 2) + 2 * settings.rounds + 3
    return 2.0 * full * out * in_features**2 + 1.5 * in_features**3


def fit_search(out: int, in_features: int, recipe: Recipe) -> float:
    """Operations in scoring codewords of one layer's fit: k-means, assignment, sweeps."""
    scheme, settings = recipe.parsed_scheme, recipe.fit
    if isinstance(scheme, GridScheme):  # a rounding per weight and round, however many levels
        return 100.0 * (settings.rounds + 2) * out * in_features
    codewords = codewords_scored(scheme, settings)
    beam = 1 + (settings.beam - 1) * (1 - 1 / scheme.num_codebooks)
    if searched_together(scheme):
        # Scores are computed once, and added up for every partial sum kept.
        beam = 1 + BEAM * (scheme.num_codebooks - 1) / (2 * scheme.in_group_size)
    passes = 2 * settings.kmeans_iterations + beam * (settings.rounds + 1)
    return 2.0 * passes * scheme.num_codebooks * codewords * out * in_features


@cache
def measure(device: str) -> Speed:
    """Rates of a device that is here, from two products and one small fit (about a second)."""
    generator = torch.Generator().manual_seed(0)
    size, out, inputs = _CPU_SIZES if device == "cpu" else _GPU_SIZES
    square = torch.randn(size, size, generator=generator).to(device)
    products = 2.0 * size**3 / _best(lambda: square @ square, device)
    vector = torch.randn(size, 1, generator=generator).to(device)
    memory = 4.0 * size**2 / _best(lambda: square @ vector, device)
    half, bus = products, memory
    if compute_dtype("auto", device) is torch.bfloat16:
        low = square.bfloat16()
        half = 2.0 * size**3 / _best(lambda: low @ low, device)
    if device != "cpu":
        host = torch.empty(square.shape, pin_memory=torch.device(device).type == "cuda")
        bus = host.nbytes / _best(lambda: square.copy_(host), device)
    base = Recipe()
    recipe = replace(base, fit=replace(base.fit, rounds=2, kmeans_iterations=4))
    linear = nn.Linear(inputs, out, bias=False, device=device)
    x = torch.randn(2 * inputs, inputs, generator=generator).to(device)
    moment = x.T @ x / len(x)
    seconds = _best(
        lambda: quantize_linear(linear, moment, recipe, generator, torch.float32), device, repeats=1
    )
    left = max(seconds - fit_products(out, inputs, recipe) / products, seconds / 4)
    search = fit_search(out, inputs, recipe) / left
    return Speed(products, half, search, memory, bus, f"measured on this {device} just now")


def _best(work: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Shortest time of some runs after one to warm up, in seconds."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])
