"""Items of gpu_product.py about toy models: tuning, loading, serving, and all layouts."""

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_graphs import decode_rates
from gpu_item import HERE, Item

sys.path.insert(0, str(HERE.parent))  # the tests' fixtures

PROMPT = list(range(60, 100))
#: Relative error of logits by type: rounding of two models of some layers.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}

LOOP = {
    "windows": 32,
    "steps": 12,
    "batch": 4,
    "microbatch": 2,
    "held_out": 8,
    "evaluate_every": 4,
    "compute": "float32",
}
TOY_RECIPE = {"samples": 16, "length": 64, "training": LOOP}
DRY_RECIPE = {
    "samples": 4,
    "length": 32,
    "scheme": "1x6g8",
    "embeddings": "1x6g8",
    "fit": {"rounds": 0, "kmeans_iterations": 2, "beam": 1},
    "finetune": {"epochs": 1},
    "training": {**LOOP, "windows": 8, "steps": 2, "evaluate_every": 1},
}


def doctor(item: Item) -> None:
    """`pvrt doctor`."""
    with item.check("doctor"):
        output = item.pvrt("doctor", "doctor")
        item.note(output=output.splitlines())
        for name in item.some(("gpu", "triton"), ()):
            assert any(line.startswith(f"ok       {name}") for line in output.splitlines()), name


def toy(item: Item) -> None:
    """Calibration and PV-Tuning of toys on the device and on the CPU: near the same result."""
    from tests.fixtures.toy import toy_model, toy_tokenizer

    recipe = item.folder / "toy.recipe.json"
    recipe.write_text(json.dumps(item.some(TOY_RECIPE, DRY_RECIPE)))
    for architecture in ("llama", "llama-tied"):
        dense = item.toy(f"{architecture}-dense")
        toy_model(architecture).save_pretrained(dense)
        toy_tokenizer().save_pretrained(dense)
    text = item.folder / "toy.txt"
    text.write_text(item.text.read_text()[:100_000])

    found = {}

    def tuned(out: str, architecture: str, device: str) -> None:
        options = ["--effort", "quick", "--config", recipe, "--data", text, "--device", device]
        with item.check(out):
            item.pvrt(out, "tune", item.toy(f"{architecture}-dense"), "-o", item.toy(out), *options)
            found[out] = json.loads((item.toy(out) / "pvrt.json").read_text())
            item.note(held_out_kl={out: found[out]["pv"]["held_out_kl"]})

    with ThreadPoolExecutor(item.some(3, 1)) as pool:
        pool.submit(tuned, "llama", "llama", item.device)
        pool.submit(tuned, "llama-tied", "llama-tied", item.device)
        pool.submit(tuned, "on-cpu", "llama", "cpu")
    with item.check("near the CPU's"):
        ours, theirs = (found[name]["pv"]["held_out_kl"] for name in ("llama", "on-cpu"))
        assert abs(ours / theirs - 1) < 0.1, (ours, theirs)
        for ours, theirs in zip(*(found[n]["blocks"] for n in ("llama", "on-cpu")), strict=True):
            for name, error in ours["errors"].items():
                assert abs(error / theirs["errors"][name] - 1) < 0.1, (name, error, theirs)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over norm of what is expected."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def load(item: Item, dtype: torch.dtype) -> None:
    """transformers on the device: packed layers against decoded ones, and generation."""
    from transformers import AutoModelForCausalLM

    import pvrt
    from pvrt.modules.whole_model import quantized_layers

    for folder in (item.toy("llama"), item.toy("llama-tied")):
        packed = dense = None
        with item.check(folder.name):
            where = {"": item.device}
            packed = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=where)
            dense = pvrt.load(folder, dense=True, dtype=dtype, device_map=where)
            layers = quantized_layers(packed)
            item.note(layers={folder.name: layer_kinds(layers)})
        if packed is None or dense is None:
            continue
        for tokens in ((1, 1), (1, 3), (1, 40), (2, 20), (16, 1), (2, 300)):
            with item.check(f"{folder.name}, {tokens[0]}x{tokens[1]}"), torch.inference_mode():
                ids = torch.randint(0, 256, tokens, generator=torch.Generator().manual_seed(0))
                ids = ids.to(item.device)
                error = relative(packed(ids).logits, dense(ids).logits)
                item.note(errors={f"{folder.name} {tokens}": error})
                assert error < TOLERANCE[dtype], error
        with item.check(f"{folder.name} generates"):
            ids = torch.tensor([PROMPT], device=item.device)
            answers = [m.generate(ids, max_new_tokens=16, do_sample=False) for m in (packed, dense)]
            rows = [answer[0, len(PROMPT) :].tolist() for answer in answers]
            item.note(generated={folder.name: rows})
            assert rows[0][:2] == rows[1][:2], rows  # rounding may part them later


def layer_kinds(layers: dict[str, Any]) -> dict[str, int]:
    """How many layers in codes there are of each class, packed or as stored."""
    kinds: dict[str, int] = {}
    for layer in layers.values():
        kind = f"{type(layer).__name__} {'stored' if layer.packed is None else 'packed'}"
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def engine(item: Item) -> None:
    """The embedded engine in this process: greedy answers are those of transformers."""
    import pvrt
    from pvrt_server.engine.engine import Engine
    from pvrt_server.engine.sampling import SamplingParams
    from pvrt_server.engine.sequences import TokenEvent
    from pvrt_server.options import ServeOptions
    from tests.fixtures.greedy import assert_greedy

    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts = [PROMPT, PROMPT[:7], PROMPT[::-1] * 6]

    def answer(running: Any, prompt: list[int]) -> list[int]:
        events = running.generate(prompt, params)
        return [event.token_id for event in events if isinstance(event, TokenEvent)]

    margins = {"float32": 1e-2, "float16": 0.1, "bfloat16": 0.6}
    for name in ("llama", "llama-tied"):
        for dtype, margin in margins.items():
            with item.check(f"{name} in {dtype}"):
                dense = pvrt.load(item.toy(name), dense=True, dtype=torch.float32)
                options = ServeOptions.model_validate({"dtype": dtype})
                with Engine.load(item.toy(name), options) as running:
                    assert running.device == item.device, running.device
                    alone = [answer(running, prompt) for prompt in prompts]
                    with ThreadPoolExecutor(len(prompts)) as pool:
                        together = list(pool.map(lambda p: answer(running, p), prompts))
                for prompt, *answers in zip(prompts, alone, together, strict=True):
                    for ids in answers:
                        assert len(ids) == 24, ids
                        assert_greedy(dense, prompt, ids, margin)
    decode_rates(item, item.toy("llama"), "float32")


def serve(item: Item) -> None:
    """`pvrt serve --check`: the server from a client's side."""
    for name in ("llama", "llama-tied"):
        with item.check(name):
            options = ["--engine", "local", "--port", 0, "--check", "--log-level", "warning"]
            item.note(output={name: item.pvrt(name, "serve", item.toy(name), *options)})


def bench(item: Item) -> None:
    """`pvrt bench` of the model, and of the kernels."""
    with item.check("model"):
        options = ["--json", "--repeats", 2, "--new-tokens", 16]
        item.note(model=json.loads(item.pvrt("model", "bench", item.toy("llama"), *options)))
    if not item.dry:
        with item.check("kernels"):
            found = item.pvrt("kernels", "bench", "kernels", item.toy("llama"), "--json")
            item.note(kernels=json.loads(found))


def variants(item: Item) -> None:
    """Bits shared out, grids, large codebooks, both kinds of targets: one quick run of each."""
    text = item.folder / "toy.txt"
    recipes: dict[str, tuple[list[object], dict[str, Any]]] = {
        "bits": (["--bits", 4.2], {}),  # the toy's tables alone take 4 bits
        "grid": (["--scheme", "w4g32"], {}),
        "large codebook": (["--scheme", "1x10g8"], {"targets": "original"}),
        "dense tables": (["--keep-embeddings"], {"pv": {"low_memory": True}}),
        "own text": (["--scheme", "2x8g4"], {}),
    }

    def run(name: str) -> None:
        options, changes = recipes[name]
        step = name.replace(" ", "-")
        recipe, out = item.folder / f"{step}.recipe.json", item.toy(step)
        recipe.write_text(json.dumps({**item.some(TOY_RECIPE, DRY_RECIPE), **changes}))
        given = [] if name == "own text" else ["--data", text]
        with item.check(name):
            where = ["-o", out, "--effort", "quick", "--config", recipe, "--device", item.device]
            dense = item.toy("llama-dense")
            item.pvrt(step, "tune", dense, *where, *given, *options, "--no-report")
            manifest = json.loads((out / "pvrt.json").read_text())
            item.note(held_out_kl={name: manifest["pv"]["held_out_kl"]})

    with ThreadPoolExecutor(item.some(3, 1)) as pool:
        list(pool.map(run, item.some(list(recipes), ["own text"])))


def layouts(item: Item) -> None:
    """Checkpoints of every architecture, scheme and grid against float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    from tests.fixtures.toy import ARCHITECTURES, EXPERTS, write_toy, write_toy_grid

    ids = torch.randint(0, 256, (2, 3), generator=torch.Generator().manual_seed(0))
    limit = time.monotonic() + item.some(100, 40)

    def compare(name: str, write: Callable[[Path], Any]) -> None:
        if time.monotonic() > limit:
            item.note(left_out={name: True})
            return
        folder = item.folder / "layouts" / name.replace(" ", "-")
        with item.check(name), torch.inference_mode():
            expected = write(folder)(ids).logits
            for dtype in (torch.float16, torch.float32):
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=dtype, device_map={"": item.device}
                )
                error = relative(model(ids.to(item.device)).logits, expected)
                item.note(errors={f"{name} {str(dtype)[6:]}": error})
                assert error < 2 * TOLERANCE[dtype], error

    for scheme in item.some(("1x16g8", "4x8g8", "3x8g8", "1x16g16", "1x8g8", "1x12g8"), ("1x8g8",)):
        compare(scheme, partial(write_toy, architecture="llama", scheme=scheme, published=True))
    for scheme in item.some(("w4g32", "w2g64", "w3g128", "w4g128s"), ("w4g32",)):
        compare(scheme, partial(write_toy_grid, architecture="llama", scheme=scheme))
    architectures = [*ARCHITECTURES, *EXPERTS]
    for architecture in item.some(architectures, ["llama-tied", "mixtral"]):
        tables = None if architecture in EXPERTS else "2x8g4"
        compare(architecture, partial(write_toy, architecture=architecture, embeddings=tables))
