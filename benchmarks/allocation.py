"""Is measured KL worth asking when bits are shared out? Writes results/allocation.json.

    PVRT_DATA=FOLDER .venv/bin/python benchmarks/allocation.py [--blocks 1,10,19,28]

SmolLM2-135M (GGUF dequantised to bfloat16), layers of some blocks in codes by the quick fit of
`pvrt tune` on the dense model's own inputs (web text, no fine-tuning), the rest dense. KL to the
original in nats per token, on other web text than second moments and noise are measured on.

    part "tensor"      one layer in 2x8g8: true KL, beside KL with noise of the same relative error,
                       shaped as the product does or plain, and beside the relative error alone
    part "allocation"  all of these layers at the bytes of 2x8g8: one scheme for all, shared out by
                       measured KL, by relative errors, and by errors weighted with output power

Rows are stored as they come. It takes about ten minutes of one core.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import data
import machine
import quickstart
import results
import torch
from torch import Tensor
from torch.nn import functional as F

from pvrt.format.scheme import Scheme
from pvrt_kernels import aqlm_dequantize
from pvrt_tune.allocate.errors import expected, fitted, tried
from pvrt_tune.allocate.knapsack import Option, choose
from pvrt_tune.allocate.noise import rows_like, shaped
from pvrt_tune.allocate.units import Unit
from pvrt_tune.data.documents import documents
from pvrt_tune.data.source_model import load_source
from pvrt_tune.fit.additive import fit_layer
from pvrt_tune.fit.objective import Objective
from pvrt_tune.model_blocks import find_blocks, linears
from pvrt_tune.randomness import seeded
from pvrt_tune.settings import EFFORTS

RECIPE = EFFORTS["quick"]
UNIFORM = Scheme.parse("2x8g8")
SCHEMES = ("1x8g8", "3x8g16", "2x8g8", "5x8g16", "3x8g8", "2x8g4")
# Windows and their length: of second moments, of noise, of true KL of one layer and of many.
MOMENTS, NOISE, ONE, MANY = (16, 256), (2, 128), (2, 128), (8, 128)


class Bench:
    """The model, layers of some blocks with their second moments, and text for all purposes."""

    def __init__(self, blocks: list[int]) -> None:
        source = load_source(str(quickstart.smollm2()))
        self.model = source.dense(torch.float32)
        prefix = find_blocks(self.model)
        self.units, self.weights = [], {}
        for index in blocks:
            for name, layer in linears(prefix.blocks[index]):
                unit = Unit.of([(f"{prefix.prefix(index)}{name}", layer)], index)
                schemes = tuple(s for s in unit.schemes if str(s) in SCHEMES)
                self.units.append(Unit(unit.names, unit.shapes, index, schemes))
                self.weights[unit.key] = layer.weight.detach().clone()
        texts = documents(str(data.need(data.WEB)))
        tokens = chain.from_iterable(source.tokenizer(str(text))["input_ids"] for text in texts)

        def take(shape: tuple[int, int]) -> Tensor:
            return torch.tensor([next(tokens) for _ in range(shape[0] * shape[1])]).view(shape)

        self.few, wide, self.one, self.many = map(take, (NOISE, MOMENTS, ONE, MANY))
        self.moments = self._moments(wide)
        self.fits: dict[tuple[str, Scheme], tuple[Tensor, float]] = {}

    def _moments(self, tokens: Tensor) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}

        def hook(args: tuple[Tensor, ...], key: str) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            sums[key] = sums.get(key, torch.zeros(1)) + x.T @ x

        handles = [
            self.model.get_submodule(unit.key).register_forward_pre_hook(
                lambda module, args, key=unit.key: hook(args, key)
            )
            for unit in self.units
        ]
        for part in torch.split(tokens, 2):
            self.model.model(part, use_cache=False)
        for handle in handles:
            handle.remove()
        return {key: total / tokens.numel() for key, total in sums.items()}

    def log_chances(self, tokens: Tensor) -> Tensor:
        """Of all tokens at every position."""
        return F.log_softmax(self.model(tokens, use_cache=False).logits, -1)

    def kl(self, tokens: Tensor, wanted: Tensor, changed: Mapping[str, Tensor]) -> float:
        """KL to the original with some layers changed."""
        for key, weight in changed.items():
            self.model.get_submodule(key).weight.data = weight
        given = self.log_chances(tokens)
        for key in changed:
            self.model.get_submodule(key).weight.data = self.weights[key]
        return float((wanted.exp() * (wanted - given)).sum(-1).mean())

    def fit(self, unit: Unit, scheme: Scheme) -> tuple[Tensor, float]:
        """A layer in codes, decoded, and its relative error."""
        at = unit.key, scheme
        if at not in self.fits:
            weight, moment = self.weights[unit.key], self.moments[unit.key]
            fit = fit_layer(weight, moment, scheme, RECIPE.fit, seeded(0, unit.key))
            done = fit.result(torch.bfloat16)
            layer = done.layer
            decoded = aqlm_dequantize(layer.codes, layer.codebooks.float(), layer.scales.float())
            self.fits[at] = decoded, done.relative_error
        return self.fits[at]


def tensors(bench: Bench, found: dict[str, dict[str, float]]) -> Iterator[dict[str, Any]]:
    """Every layer alone; `found` takes what the product would know of it."""
    few, one = bench.log_chances(bench.few), bench.log_chances(bench.one)
    all_tried = tried(bench.units)
    for unit in bench.units:
        key = unit.key
        weight, moment = bench.weights[key], bench.moments[key]
        schemes = unit.schemes if key in all_tried else [UNIFORM]
        errors = fitted(weight, moment, schemes, RECIPE, seeded(0, f"{key} rows"))
        level = errors[UNIFORM] ** 0.5
        noise = shaped(weight, moment, RECIPE.fit.damping, seeded(0, f"{key} noise"))
        plain = rows_like(weight, seeded(0, f"{key} noise"))
        plain /= Objective(weight, moment).relative_error(weight - plain) ** 0.5
        decoded, error = bench.fit(unit, UNIFORM)
        kl_noise = bench.kl(bench.few, few, {key: weight + level * noise})
        power = Objective(weight, moment).power
        yield {
            "layer": key,
            "relative_error": error,
            "expected_relative_error": errors[UNIFORM],
            "output_power": power,
            "kl": bench.kl(bench.one, one, {key: decoded}),
            "kl_same_text": bench.kl(bench.few, few, {key: decoded}),
            "kl_shaped_noise": kl_noise,
            "kl_plain_noise": bench.kl(bench.few, few, {key: weight + level * plain}),
        }
        named = {str(scheme): value for scheme, value in errors.items()}
        found[key] = {"kl": kl_noise, "power": power, **named}


def allocations(bench: Bench, found: dict[str, dict[str, float]]) -> Iterator[dict[str, Any]]:
    """All layers at once, at the bytes of one scheme for all."""
    errors = expected(bench.units, found)
    wanted = bench.log_chances(bench.many)
    budget = sum(unit.bits(UNIFORM, 16) for unit in bench.units)
    shares = {
        "measured KL": {k: v["kl"] / v[str(UNIFORM)] for k, v in found.items()},
        "relative errors": dict.fromkeys(found, 1.0),
        "errors of outputs": {k: v["power"] for k, v in found.items()},
    }
    choices = {"one scheme": [UNIFORM] * len(bench.units)}
    for method, share in shares.items():
        items = [
            [Option(unit.bits(s, 16), share[unit.key] * errors[unit.key][s]) for s in unit.schemes]
            for unit in bench.units
        ]
        chosen = choose(items, budget)
        choices[method] = [u.schemes[index] for u, index in zip(bench.units, chosen, strict=True)]
    for method, schemes in choices.items():
        decoded, bits, predicted = {}, 0, 0.0
        for unit, scheme in zip(bench.units, schemes, strict=True):
            decoded[unit.key], _ = bench.fit(unit, scheme)
            bits += unit.bits(scheme, 16)
            predicted += shares["measured KL"][unit.key] * errors[unit.key][scheme]
        yield {
            "method": method,
            "bytes": bits // 8,
            "bits_per_weight": bits / sum(unit.weights for unit in bench.units),
            "kl": bench.kl(bench.many, wanted, decoded),
            "predicted_kl": predicted,
            "schemes": {u.key: str(s) for u, s in zip(bench.units, schemes, strict=True)},
        }


def spearman(first: list[float], second: list[float]) -> float:
    """Correlation of ranks, without ties."""
    ranks = torch.tensor([first, second], dtype=torch.float64).argsort(1).argsort(1).double()
    return float(torch.corrcoef(ranks)[0, 1])


@torch.inference_mode()
def main() -> None:
    """Run both parts, print as it goes and store the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", default="1,10,19,28")
    bench = Bench([int(index) for index in parser.parse_args().blocks.split(",")])
    found: dict[str, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    for part in (tensors, allocations):
        for row in part(bench, found):
            rows.append({**row, "part": part.__name__[:-1], **machine.describe()})
            print(row, flush=True)
            results.store("allocation", rows)
        if part is tensors:
            true = [row["kl"] for row in rows]
            for name in ("kl_same_text", "kl_shaped_noise", "kl_plain_noise", "relative_error"):
                print(f"rank correlation of {name}", spearman([r[name] for r in rows], true))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
