"""Every decoder of transformers at toy size: is it planned, tuned, loaded and served?

    python benchmarks/architectures.py [NAME ...] [--no-vllm]

Random weights, real configuration classes, one process each (small_models.py). A row of
benchmarks/results/architectures.json says of an architecture:

plan: takes, or refused in one sentence before anything is spent. tune: in codes, scheme 2x8g8.
load_equal: in transformers, logits of codes are the decoded ones'. engine: greedy tokens of the
embedded engine are the decoded model's. vllm: so are vLLM's on a CPU; empty where vLLM has no code
of this architecture, or does not run the original on a CPU. grid: a scalar grid is tuned and
loaded, or plan refuses it in one sentence. message: the sentences.

Architectures that are recorded are left out unless they are named, so it can be stopped any time.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import results
import torch
from small_models import architectures, small_model

from pvrt.errors import PvrtError
from tests.fixtures.toy import toy_tokenizer
from tests.fixtures.vllm_generate import ENVIRONMENT

NAME = "architectures"
SECONDS = 300
STEPS = ("plan", "tune", "load_equal", "engine", "vllm", "grid")
PROMPT = [256, *range(40, 60)]
NEW_TOKENS = 8
#: Distance to the highest logit, in standard deviations of the logits, that is a tie: packed
#: products round what they multiply. A random token lacks about 3.
TIE = 0.1
Note = Callable[[str, Any], None]


class Failed(Exception):
    """A result that is there and wrong; its text says how."""


def one(name: str, note: Note, vllm: bool) -> None:
    """Try an architecture; `note(step, value)` gets what comes out, step by step."""
    import pvrt
    from pvrt_tune.pipeline import tune
    from pvrt_tune.plan.on_machine import plan_here
    from pvrt_tune.settings import FinetuneSettings, FitSettings, Recipe, TuneJob

    recipe = Recipe(
        scheme="2x8g8",
        embeddings="keep",
        samples=4,
        length=32,
        fit=FitSettings(rounds=1, kmeans_iterations=3, cg_iterations=3, beam=1),
        finetune=FinetuneSettings(epochs=1),
        training=None,
    )
    with TemporaryDirectory() as folder:
        root = Path(folder)

        def job(scheme: str) -> TuneJob:
            made, text = replace(recipe, scheme=scheme), str(root / "text.txt")
            return TuneJob(str(root / "dense"), root / scheme, made, text, "cpu")

        with step("model", note, root) as done:
            small_model(name).save_pretrained(root / "dense")
            toy_tokenizer().save_pretrained(root / "dense")
            (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
        if not done:
            return
        with step("plan", note, root) as planned:
            plan_here(job("2x8g8"))
            note("plan", "takes")
        if not planned:
            return
        with step("tune", note, root) as tuned:
            check_blocks(root / "dense")
            tune(job("2x8g8"), lambda line: None)
            note("tune", True)
        if not tuned:
            return
        judge = None
        with step("load_equal", note, root):
            judge = pvrt.load(root / "2x8g8", dense=True, dtype=torch.float32)
            wanted = logits(judge, PROMPT)
            gap = logits(pvrt.load(root / "2x8g8", dtype=torch.float32), PROMPT) - wanted
            if not gap.abs().max() < 1e-3 * wanted.abs().max():
                raise Failed(f"logits differ by {gap.abs().max() / wanted.abs().max():.2g}")
            note("load_equal", True)
        with step("grid", note, root):
            plan_here(job("w4g16s"))
            tune(job("w4g16s"), lambda line: None)
            check_finite(pvrt.load(root / "w4g16s", dtype=torch.float32))
            note("grid", True)
        if judge is None:
            return
        with step("engine", note, root):
            check_tokens(judge, engine_tokens(root / "2x8g8"))
            note("engine", True)
        if vllm and in_vllm(judge):
            with step("vllm", note, root):
                tokens = vllm_tokens(root / "2x8g8", root / "dense", note)
                if tokens is not None:
                    check_tokens(judge, tokens)
                    note("vllm", True)


@contextmanager
def step(name: str, note: Note, root: Path) -> Iterator[list[bool]]:
    """A step whose failure ends itself only; yields what is empty unless it went through."""
    went: list[bool] = [True]
    try:
        yield went
    except PvrtError as error:
        went.clear()
        note(name, "refused")
        note("message", f"{name}: " + " ".join(str(error).replace(f"{root}/", "").split()))
    except Failed as error:
        went.clear()
        note(name, False)
        note("message", f"{name}: {error}")
    except Exception as error:
        went.clear()
        note(name, False)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(frame.filename).name}:{frame.lineno}"
        first = str(error).strip().split("\n")[0]
        note("message", f"{name}: {type(error).__name__} at {at}: {first}"[:300])
        if os.environ.get("TRACE"):
            traceback.print_exc()


def logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """[length, vocabulary] of one row of tokens."""
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    return found


def check_blocks(folder: Path) -> None:
    """Raise Failed unless the blocks of a model, one after the other, compute what it does."""
    from pvrt_tune.data.activations import Activations, in_memory
    from pvrt_tune.data.source_model import load_source
    from pvrt_tune.model_blocks import find_blocks, run_block
    from pvrt_tune.model_calls import record_inputs, run_head

    model = load_source(str(folder)).dense(torch.float32)
    blocks = find_blocks(model)
    tokens = torch.tensor([PROMPT, PROMPT[::-1]])
    width = model.get_input_embeddings().weight.shape[1]
    hidden = Activations(in_memory((*tokens.shape, width)), 1, "cpu")
    with torch.no_grad():
        arguments = record_inputs(model, blocks, tokens, 1, hidden)
        for block, own in zip(blocks.blocks, arguments, strict=True):
            for number, states in enumerate(hidden):
                hidden[number] = run_block(block, states, own[number])
        found = torch.cat(
            [run_head(model, blocks, tokens[n : n + 1], states) for n, states in enumerate(hidden)]
        )
        wanted = model(tokens, use_cache=False).logits
    if not (found - wanted).abs().max() < 1e-4 * wanted.abs().max():
        raise Failed("the blocks, one after the other, do not compute what the model does")


def check_finite(model: Any) -> None:
    """Raise Failed for logits that are not finite."""
    if not torch.isfinite(logits(model, PROMPT)).all():
        raise Failed("logits are not finite")


def check_tokens(judge: Any, tokens: list[int]) -> None:
    """Raise Failed unless each token is the best of the judge's logits after those before."""
    if tokens == generated(judge):  # MiniMax's own cache changes its logits
        return
    found = logits(judge, [*PROMPT, *tokens])[len(PROMPT) - 1 : -1]
    chosen = found.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    short = float(((found.amax(1) - chosen) / found.std(1)).max())
    if len(tokens) != NEW_TOKENS or not short <= TIE:
        raise Failed(f"tokens are not the decoded model's ({short:.2g} standard deviations off)")


def generated(judge: Any) -> list[int] | None:
    """Greedy tokens of transformers; None where its `generate` does not run the model."""
    try:
        judge.generation_config.eos_token_id = None
        with torch.inference_mode():
            prompt = torch.tensor([PROMPT])
            whole = judge.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    except Exception:
        return None
    tokens: list[int] = whole[0, len(PROMPT) :].tolist()
    return tokens


def engine_tokens(folder: Path) -> list[int]:
    """Greedy tokens of the embedded engine in float32."""
    from pvrt_server.engine.engine import Engine
    from pvrt_server.engine.sampling import SamplingParams
    from pvrt_server.engine.sequences import TokenEvent
    from pvrt_server.options import ServeOptions

    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    # Those without positions name no longest context.
    options = ServeOptions.model_validate({"dtype": "float32", "max_model_len": 128})
    with Engine.load(folder, options) as engine:
        events = engine.generate(PROMPT, params)
        return [event.token_id for event in events if isinstance(event, TokenEvent)]


def in_vllm(model: Any) -> bool:
    """Whether vLLM has code of its own for a model's class."""
    from vllm.model_executor.models.registry import ModelRegistry

    return type(model).__name__ in ModelRegistry.get_supported_archs()


def vllm_tokens(folder: Path, original: Path, note: Note) -> list[int] | None:
    """Greedy tokens of vLLM in float32; None where it does not run the original here either."""
    from tests.fixtures.vllm_generate import _generate

    def answer(path: Path) -> dict[str, Any]:
        job = {"folder": str(path), "packed": None, "engine": {"gpu_memory_utilization": 0.05},
               "prompts": None, "rounds": 1, "lora": None}  # fmt: skip
        return _generate(job, [PROMPT], NEW_TOKENS, 1)

    found = answer(folder)
    if "error" not in found:
        tokens: list[int] = found["tokens"][0]
        return tokens
    if "error" in answer(original):
        note("message", f"vllm does not run the original on a CPU: {found['error'][:160]}")
        return None
    raise Failed(found["error"].split("\n")[0][:300])


def _child(name: str, pipe: Any, vllm: bool) -> None:
    if not os.environ.get("TRACE"):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
    one(name, lambda key, value: pipe.send((key, value)), vllm)
    pipe.close()
    os._exit(0)  # vLLM's threads do not end


def run(name: str, vllm: bool) -> dict[str, Any]:
    """One architecture in a process of its own, which may die or hang."""
    row: dict[str, Any] = {"architecture": name, **dict.fromkeys(STEPS)}
    messages: list[str] = []
    ours, theirs = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_child, args=(name, theirs, vllm))
    process.start()
    theirs.close()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        messages.append(f"not done after {SECONDS} s")
    try:
        while ours.poll():
            key, value = ours.recv()
            if key == "message":
                messages.append(value)
            else:
                row[key] = value
    except EOFError:
        pass
    return {**row, "message": "; ".join(messages)}


def main() -> None:
    """Run what is named, or what is not recorded yet."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--no-vllm", action="store_true")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    # Here, for children then have them: imports take longer than a toy model.
    modules = ["pvrt_server.engine.engine", "pvrt_tune.pipeline", "compressed_tensors"]
    if not arguments.no_vllm:
        modules.append("vllm.entrypoints.llm")
    for module in modules:
        importlib.import_module(module)
    import transformers

    from pvrt_tune.plan import speed

    torch.set_num_threads(1)
    speed.measure("cpu")
    transformers.logging.set_verbosity_error()
    recorded = {row["architecture"] for row in results.load(NAME)}
    for name in arguments.names or [name for name in architectures() if name not in recorded]:
        row = run(name, not arguments.no_vllm)
        print(json.dumps(row), flush=True)
        rows = results.renewed(results.load(NAME), [row], "architecture")
        results.store(NAME, sorted(rows, key=lambda row: str(row["architecture"])))


if __name__ == "__main__":
    main()
