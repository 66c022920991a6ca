"""Every decoder of transformers at toy size: does plan take it, is it tuned, does it load and run?

    python benchmarks/architectures.py [NAME ...]

Random weights, real configuration classes, one process each. Results go to
benchmarks/results/architectures.json, line by line; architectures that are there are left out
unless they are named. What cannot be made small by itself has its settings in SPECIAL.
"""

import importlib
import json
import multiprocessing
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests' fixtures

from tests.fixtures.decoders import DECODERS, REFUSED  # noqa: E402
from tests.fixtures.toy import EXPERTS, VOCABULARY, random_model, toy_tokenizer  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
SECONDS = 240
#: Small values for what configurations call by these names, where they have them.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_channels": 16,
    "attention_head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window": 16,
    "layer_types": None,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
SPECIAL: dict[str, dict[str, Any]] = {**EXPERTS, **DECODERS, **REFUSED}
#: Encoders, and decoders of encoders, that transformers lists as language models as well.
NO_DECODERS = frozenset(
    [
        "bart",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "camembert",
        "cpmant",
        "data2vec-text",
        "electra",
        "ernie",
        "marian",
        "mbart",
        "megatron-bert",
        "moshi",
        "musicgen",
        "musicgen_melody",
        "mvp",
        "pegasus",
        "plbart",
        "prophetnet",
        "reformer",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "trocr",
        "whisper",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
    ]
)


def architectures() -> list[str]:
    """Model types of all decoders that transformers knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NO_DECODERS]


def small_model(name: str) -> Any:
    """A random model of an architecture."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if name in SPECIAL:
        return random_model(AutoConfig.for_model(name, **{**_common(name), **SPECIAL[name]}))
    usual = CONFIG_MAPPING[name]()
    names = {**usual.to_dict(), **getattr(usual, "attribute_map", {})}
    parts = ("text_config", "vision_config", "audio_config")
    settings = {key: value for key, value in SMALL.items() if key in names}
    for part in parts:
        inner = getattr(usual, part, None)
        if inner is not None:
            own = inner.to_dict()
            settings[part] = {key: value for key, value in SMALL.items() if key in own}
    return random_model(AutoConfig.for_model(name, **settings))


def _common(name: str) -> dict[str, Any]:
    if name not in EXPERTS:
        return {}
    known = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    return {key: SMALL[key] for key in (*known, "num_attention_heads", "num_key_value_heads")}


def one(name: str, note: Any) -> None:
    """Try an architecture; `note(key, value)` gets what comes out, step by step."""
    import pvrt
    from pvrt.cli.bench import engine_speed
    from pvrt.cli.shared import Dtype
    from pvrt.errors import PvrtError
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
    tokens = torch.arange(24)[None] % 200

    def logits(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = model(tokens, use_cache=False).logits.float()
        return found

    with TemporaryDirectory() as folder:
        root, step = Path(folder), "model"
        try:
            small_model(name).save_pretrained(root / "dense")
            toy_tokenizer().save_pretrained(root / "dense")
            (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)

            def job(scheme: str) -> TuneJob:
                made = replace(recipe, scheme=scheme)
                text = str(root / "text.txt")
                return TuneJob(str(root / "dense"), root / scheme, made, text, "cpu")

            step = "plan"
            plan_here(job("2x8g8"))
            note(step, "takes")
            step = "tune"
            tune(job("2x8g8"), lambda line: None)
            note(step, True)
            step = "load_equal"
            wanted = logits(pvrt.load(root / "2x8g8", dense=True, dtype=torch.float32))
            gap = logits(pvrt.load(root / "2x8g8", dtype=torch.float32)) - wanted
            note(step, bool(gap.abs().max() < 1e-3 * wanted.abs().max()))
            step = "grid"
            try:
                plan_here(job("w4g16s"))
            except PvrtError as error:
                note(step, f"refused: {error}")
            else:
                tune(job("w4g16s"), lambda line: None)
                wanted = logits(pvrt.load(root / "w4g16s", dtype=torch.float32))
                note(step, bool(torch.isfinite(wanted).all()))
            step = "engine"
            engine_speed(root / "2x8g8", Dtype.auto, 8, 8, 1)
            note(step, True)
        except PvrtError as error:
            note(step, "refused")
            note("message", " ".join(str(error).replace(str(root), "").split()))
        except Exception as error:
            note(step, False)
            at = traceback.extract_tb(error.__traceback__)[-1]
            note("message", f"{type(error).__name__} in {at.name}: {error}".split("\n")[0][:300])


def _child(name: str, pipe: Any) -> None:
    one(name, lambda key, value: pipe.send((key, value)))
    pipe.close()


def run(name: str) -> dict[str, Any]:
    """One architecture in a process of its own, which may die or hang."""
    row: dict[str, Any] = {"architecture": name}
    row |= dict.fromkeys(("plan", "tune", "load_equal", "engine", "vllm", "grid"))
    row["message"] = ""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(name, theirs))
    process.start()
    theirs.close()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        row["message"] = f"not done after {SECONDS} s"
    try:
        while ours.poll():
            key, value = ours.recv()
            row[key] = value
    except EOFError:
        pass
    return row


def main() -> None:
    """Run what is named, or what is not recorded yet."""
    # Here, for children then have them: imports take longer than a toy model.
    for module in ("pvrt.cli.bench", "pvrt_server.engine.engine", "pvrt_tune.pipeline"):
        importlib.import_module(module)
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = {}
    if RESULTS.exists():
        rows = {row["architecture"]: row for row in json.loads(RESULTS.read_text())}
    wanted = sys.argv[1:] or [name for name in architectures() if name not in rows]
    for name in wanted:
        rows[name] = run(name)
        print(json.dumps(rows[name]), flush=True)
        ordered = [rows[key] for key in sorted(rows)]
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()
