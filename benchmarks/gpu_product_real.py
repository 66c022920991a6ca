"""Items of gpu_product.py about a real model: its plan, its run with interruptions, its result."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from gpu_graphs import decode_rates
from gpu_item import Item

REAL = {
    "fit": {"rounds": 1, "kmeans_iterations": 6, "beam": 2},
    "training": {
        "windows": 64,
        "steps": 40,
        "batch": 4,
        "microbatch": 4,
        "held_out": 8,
        "evaluate_every": 5,
    },
}


def real_options(item: Item) -> list[object]:
    """Options of both plan and tune."""
    recipe = item.folder / "real.recipe.json"
    dry = {
        "scheme": "1x6g4",
        "samples": 2,
        "length": 64,
        "fit": {"rounds": 0, "kmeans_iterations": 1, "beam": 1},
    }
    small = {"windows": 4, "steps": 4, "batch": 2, "microbatch": 2, "held_out": 2}
    loop = {"training": {**REAL["training"], **small, "evaluate_every": 1}}
    content = {**dry, "finetune": {"epochs": 0}, **loop} if item.dry else REAL
    recipe.write_text(json.dumps(content))
    limit = item.some("150s", "30m")  # of each command; the steps end it earlier
    options = ["--effort", "quick", "--config", recipe, "--for", limit, "--device", item.device]
    return [*options, "--data", item.text, *item.some([], ["--keep-embeddings"])]


def sampling(item: Item) -> None:
    """Text that the model writes itself: seconds, and the same for the same seed."""
    from pvrt_tune.data.sampled import from_model
    from pvrt_tune.data.source_model import load_source
    from pvrt_tune.data.text import Windows

    with item.check("sampling"):
        assert item.model is not None
        model = load_source(item.model).dense(item.some(None, torch.float32), item.device)
        count, length = item.some((72, 256), (2, 12))
        short, first = (from_model(model, Windows(count, n, 0)).tokens for n in (8, 8))
        assert torch.equal(short, first)
        started = time.monotonic()
        tokens = from_model(model, Windows(count, length, 0)).tokens
        item.note(tokens=tokens.numel(), sampling_seconds=time.monotonic() - started)
        item.note(distinct=len(set(tokens.flatten().tolist())))


def plan(item: Item) -> None:
    """`pvrt plan` of the run to come."""
    with item.check("plan"):
        output = item.pvrt("plan", "plan", item.model, *real_options(item), "--json")
        item.note(plan=json.loads(output))


def tune(item: Item) -> None:
    """A run that Ctrl-C ends in calibration and in PV-Tuning, and that goes on both times."""
    out = item.folder / "real"
    command = ["tune", item.model, "-o", out, *real_options(item)]
    with item.check("stopped in calibration"):
        item.pvrt("first", *command, interrupt="block 2/", code=130)
    with item.check("stopped in PV-Tuning"):
        line = item.some("PV step 5/", "PV step 1/")
        output = item.pvrt("second", *command, "--resume", interrupt=line, code=130)
        again = [line for line in output.splitlines() if line.startswith("block 1/")]
        assert all("is finished" in line for line in again), again
    with item.check("to the end"):
        item.pvrt("third", *command, "--resume")
    with item.check("its journal"):
        lines = (out / ".run" / "journal.jsonl").read_text().splitlines()
        reports = {e["name"]: e["report"] for e in map(json.loads, lines) if e["event"] == "piece"}
        blocks = [r["seconds"] for name, r in reports.items() if name.startswith("block-")]
        manifest = json.loads((out / "pvrt.json").read_text())
        item.note(
            block_seconds=blocks,
            output_errors=[r["output_error"] for n, r in reports.items() if n.startswith("block-")],
            pv={"curves": manifest["pv"].get("curves"), "kl": manifest["pv"]["held_out_kl"]},
            model_card=(out / "README.md").is_file() and (out / "report.html").is_file(),
        )
        assert (out / "README.md").is_file() and (out / "report.html").is_file()


def loaded(item: Item) -> None:
    """The real result: peaks against the plan, perplexity, comparison, speed, a server."""
    from pvrt_tune.plan.memory_plan import CUDA_DEVICE_BYTES

    out = item.folder / "real"
    with item.check("peaks against the plan"):
        item.note(plan_over_measured=plan_ratios(item, CUDA_DEVICE_BYTES))
    measure = ["--text", item.text, "--context", 256, "--windows", item.some(8, 1), "--json"]
    values = {}

    def perplexity(name: str, model: object, device: str, dtype: str) -> None:
        with item.check(f"perplexity {name}"):
            where = ["--device", device, "--dtype", dtype]
            values[name] = json.loads(item.pvrt(name, "eval", model, *measure, *where))["value"]
            item.note(perplexity=dict(values))

    def compare() -> None:
        with item.check("compare"):
            options = ["--windows", item.some(4, 1), "--new-tokens", item.some(32, 2)]
            options += ["--html", item.folder / "real.html", "--device", item.device, "--json"]
            found = item.pvrt("compare", "compare", item.model, out, *options)
            item.note(compare=json.loads(found))

    with ThreadPoolExecutor(item.some(5, 1)) as pool:
        pool.submit(compare)
        pool.submit(perplexity, "cpu", out, "cpu", "float32")
        pool.submit(perplexity, "here", out, item.device, "auto")
        pool.submit(perplexity, "float32", out, item.device, "float32")
        pool.submit(perplexity, "original", item.model, item.device, "auto")
    with item.check("perplexities agree"):
        assert abs(values["float32"] / values["cpu"] - 1) < 2e-3, values
        assert abs(values["here"] / values["cpu"] - 1) < 2e-2, values
    with item.check("bench"):
        options = ["--json", "--repeats", 3, "--new-tokens", item.some(64, 2)]
        item.note(bench=json.loads(item.pvrt("bench", "bench", out, *options)))
    decode_rates(item, out, "auto")
    with item.check("serve"):
        options = ["--engine", "local", "--port", 0, "--check", "--log-level", "warning"]
        item.note(serve=item.pvrt("serve", "serve", out, *options).splitlines())
    with item.check("generation"):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(out, device_map={"": item.device})
        tokenizer = AutoTokenizer.from_pretrained(out)
        ids = tokenizer("The capital of France is", return_tensors="pt").to(item.device)
        answer = model.generate(**ids, max_new_tokens=item.some(32, 2), do_sample=False)
        item.note(generated=tokenizer.decode(answer[0]))


def plan_ratios(item: Item, context: int) -> dict[str, Any]:
    """By phase: bytes and seconds that were planned and that the runs of `tune` took in all."""
    stored = {name: json.loads((item.folder / f"{name}.json").read_text()) for name in PHASES}
    runs = stored["tune"]["figures"]["commands"].values()
    rows = {}
    for phase in stored["plan"]["figures"]["plan"]["phases"]:
        name = phase["name"]
        peaks = [run["phases"].get(name, 0) for run in runs]
        planned = phase["device_bytes"] - (context if phase["device_bytes"] else 0)
        rows[name] = {
            "planned_bytes": planned,
            "measured_bytes": max(peaks, default=0),
            "ratio": planned / max(peaks) if any(peaks) else None,
            "planned_seconds": phase["seconds"],
            "measured_seconds": sum(run["seconds"].get(name, 0.0) for run in runs),
        }
    return rows


PHASES = ("plan", "tune")
