"""The Pareto table's measurements against plain ones, and what its rows are made of."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pvrt.tools import divergence
from pvrt.tools.perplexity import perplexity
from tests.fixtures.toy import VOCABULARY, toy_model, toy_tokenizer

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def protocol(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/pareto_evaluate.py."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("pareto_evaluate")


@pytest.fixture
def pareto(protocol: ModuleType) -> ModuleType:
    """benchmarks/pareto.py."""
    return importlib.import_module("pareto")


def spread(architecture: str, seed: int) -> Any:
    """A toy model whose logits differ as a trained one's do."""
    model = toy_model(architecture, seed)
    with torch.no_grad():
        model.base_model.norm.weight.add_(4)
    return model


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "gemma3_text"])
def test_perplexity_and_kl_are_the_plain_ones(
    architecture: str, protocol: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of hidden states, in parts, as against whole logits in float64."""
    monkeypatch.setattr(divergence, "CHUNK_BYTES", 4 * VOCABULARY * 100)
    original, other = spread(architecture, 0), spread(architecture, 1)
    ids = torch.randint(0, 300, (2, 170))
    with torch.inference_mode():
        states = torch.cat([protocol.hidden(original, row.unsqueeze(0)) for row in ids])
        theirs = original(ids).logits[:, :-1].double().log_softmax(-1)
        ours = other(ids).logits[:, :-1].double().log_softmax(-1)
    weight = original.get_output_embeddings().weight
    found = protocol.text(other, ids, states, weight)
    assert found["ppl"] == pytest.approx(perplexity(other, ids).value, rel=1e-5)
    kl = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()
    assert found["kl"] == pytest.approx(float(kl), rel=1e-4) and found["kl"] > 0.1
    half = ids.shape[1] // 2
    losses = -ours[:, half - 1 :].gather(2, ids[:, half:, None])
    assert found["ppl_second_half"] == pytest.approx(float(losses.mean().exp()), rel=1e-4)
    own = protocol.text(original, ids, states, weight)
    assert abs(own["kl"]) < 1e-6
    assert protocol.text(None, ids, states, weight) == pytest.approx({**own, "kl": 0}, rel=1e-5)


def test_an_original_whose_head_does_more_than_multiply_is_refused(
    protocol: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weight alone is kept, so a bias would be lost."""
    monkeypatch.setattr(protocol, "tokens", lambda *_: torch.randint(0, 300, (2, 20)))
    model = spread("llama", 0)
    kept = protocol.reference("c4", model, None, protocol.Settings())
    assert kept["states"].shape[:2] == (2, 20)
    assert torch.equal(kept["head"], model.lm_head.weight)
    model.lm_head.bias = torch.nn.Parameter(torch.ones(VOCABULARY))
    with pytest.raises(ValueError, match="LlamaForCausalLM does more to its logits than multiply"):
        protocol.reference("c4", model, None, protocol.Settings())


def test_greedy_is_the_share_before_generated_tokens_differ(protocol: ModuleType) -> None:
    """What is shown token by token equals what the other model would have written itself."""
    original = spread("llama", 0)
    other = spread("llama", 0)
    with torch.no_grad():
        for parameter in other.model.layers.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    prompts, continued = torch.randint(0, 250, (8, 5)), 40
    given = {"max_new_tokens": continued, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(prompts)
    sequences, written = (
        model.generate(prompts, attention_mask=mask, pad_token_id=0, **given)
        for model in (original, other)
    )
    equal = (sequences == written)[:, 5:].int().cumprod(1).sum(1)
    assert len(set(equal.tolist())) > 2, equal
    share = protocol.greedy(other, sequences, 5)
    assert share == pytest.approx(float(equal.sum()) / (8 * continued))
    assert protocol.greedy(original, sequences, 5) == 1


def tasks(folder: Path) -> None:
    """A few items of every form that the task files have."""
    rows: dict[str, dict[str, Any]] = {
        "piqa": {"query": "How?\n", "choices": ["so, by hand", "so it is", "no"], "gold": 1},
        "winogrande": {
            "context_options": ["Ann as Ann", "Ann as Bob"],
            "continuation": "won",
            "gold": 0,
        },
        "lambada_openai": {"context": "one two three", "continuation": "four five"},
    }
    (folder / "tasks").mkdir()
    for name, row in rows.items():
        lines = [row | {"query": f"{'more ' * n}How?"} for n in range(3)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "tasks" / f"{name}.jsonl").write_text(text)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("task", ["piqa", "winogrande", "lambada_openai"])
def test_packed_answers_are_scored_as_each_alone(
    architecture: str,
    task: str,
    protocol: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers that share a beginning, beside longer items, against one sequence at a time."""
    tasks(tmp_path)
    monkeypatch.setenv("PVRT_DATA", str(tmp_path))
    model = spread(architecture, 0)
    found = protocol.items(task, toy_tokenizer(), 3)
    scores = protocol.log_probabilities(model, [protocol.pack(item) for item in found])
    for item, scored in zip(found, scores, strict=True):
        for answer, (total, chosen) in zip(item.answers, scored, strict=True):
            ids = torch.tensor([answer.ids])
            with torch.inference_mode():
                whole = model(ids).logits
            logits = whole[0, answer.first - 1 : -1].double().log_softmax(-1)
            wanted = ids[0, answer.first :]
            alone = logits.gather(1, wanted.unsqueeze(1)).sum()
            assert 0 < len(wanted) < len(answer.ids)
            assert total == pytest.approx(float(alone), rel=1e-4)
            assert chosen == bool((logits.argmax(-1) == wanted).all())


def test_an_item_that_does_not_fit_a_sliding_window_is_refused(protocol: ModuleType) -> None:
    item = protocol.Item([protocol.Answer(list(range(40)), 30, 9)], 0)
    with pytest.raises(ValueError, match="sliding window of 32 tokens"):
        protocol.log_probabilities(toy_model("gemma3_text"), [protocol.pack(item)])


def test_accuracy_is_by_byte_and_of_one_answer_by_choice(protocol: ModuleType) -> None:
    answers = [protocol.Answer([0], 0, size) for size in (10, 2)]
    item = protocol.Item(answers, 0)
    assert protocol.accuracy([item], [[(-5.0, False), (-4.0, True)]]) == 1  # 0.5 and 2 a byte
    assert protocol.accuracy([item], [[(-5.0, False), (-0.4, True)]]) == 0
    single = protocol.Item(answers[:1], 0)
    assert protocol.accuracy([single, single], [[(-5.0, True)], [(-5.0, False)]]) == 0.5


def test_a_gguf_keeps_its_values_rounded_and_its_metadata(
    protocol: ModuleType, tmp_path: Path
) -> None:
    """Blocks of 4 bits become bfloat16; vectors stay float32, with the same rounding."""
    gguf = importlib.import_module("gguf")
    convert = importlib.import_module("pareto_gguf")
    values = np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32)
    kind = gguf.GGMLQuantizationType.Q4_1
    blocks = gguf.quantize(values, kind)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_uint32("llama.block_count", 7)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", ""])
    writer.add_float32("llama.rope.freq_base", 0.5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_tensor("w", blocks, raw_dtype=kind)
    writer.add_tensor("norm", values[0])
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    convert.to_bfloat16(tmp_path / "a.gguf", tmp_path / "b.gguf")
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    held = {name: field.contents() for name, field in reader.fields.items()}
    assert held["llama.block_count"] == 7 and held["llama.rope.freq_base"] == 0.5
    assert held["tokenizer.ggml.tokens"] == ["a", "é", ""]
    assert held["general.architecture"] == "llama"
    assert held["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    read = {tensor.name: tensor for tensor in reader.tensors}
    for name, expected in (("w", gguf.dequantize(blocks, kind)), ("norm", values[0])):
        rounded = torch.tensor(expected).bfloat16().float()
        found = gguf.dequantize(read[name].data, read[name].tensor_type)
        assert torch.equal(torch.tensor(found), rounded)
    assert read["norm"].tensor_type == gguf.GGMLQuantizationType.F32


def test_parts_are_measured_once_and_again_by_other_settings(
    pareto: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[tuple[str, int]] = []

    def measure(part: str, model: Any, tokenizer: Any, reference: Any, settings: Any) -> Any:
        measured.append((part, settings.windows))
        return {"ppl": 1.0}

    monkeypatch.setattr(pareto.protocol, "measure", measure)
    for name in ("tokenizer", "load", "reference"):
        monkeypatch.setattr(pareto.Work, name, lambda *_: None)
    for windows in (3, 3, 5, 5):
        options = argparse.Namespace(
            work=tmp_path, name="m", model=None, windows=windows, items=9, prompts=2
        )
        pareto.Work(options).evaluate("HQQ", "2 bits g64", ["wikitext2", "tasks"])
    assert measured == [("wikitext2", 3), ("tasks", 3), ("wikitext2", 5)]


def test_a_row_names_the_machine_and_commit_that_made_its_file(
    pareto: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whichever puts it into the table, and however often."""

    class Toy(pareto.Tool):  # type: ignore[misc, name-defined]
        name, methods, files = "toy", ("m",), "file"

        def versions(self) -> dict[str, str]:
            return {"toy": "7"}

        def make(self, case: Any, method: str) -> None:
            (case.out / "file").write_bytes(bytes(3))

        def weights(self, case: Any) -> dict[str, torch.Tensor]:
            return {"w": torch.zeros(2)}

    def described(commit: str) -> None:
        about = {"machine": "here", "versions": {"torch": "1"}, "commit": commit}
        monkeypatch.setattr(pareto.machine, "describe", lambda: about)

    monkeypatch.setattr(pareto, "TOOLS", {"toy": Toy()})
    monkeypatch.setattr(pareto.data, "need", Path)
    for name, value in (("model", tmp_path), ("gguf", tmp_path), ("parameters", 12)):
        monkeypatch.setattr(pareto.Work, name, value)
    options = argparse.Namespace(work=tmp_path, name="n", windows=3, items=9, prompts=2)
    work = pareto.Work(options)
    described("first")
    work.make(Toy(), "m")
    assert list(work.rows()) == []  # not measured yet
    for place, kl in ((("toy", "m"), 0.5), (("original", "bfloat16"), 0.01)):
        work.place(*place).mkdir(parents=True, exist_ok=True)
        figures = json.dumps({"wikitext2": {"kl": kl, "settings": {"windows": 3}}})
        (work.place(*place) / "evaluated.json").write_text(figures)
    described("second")
    (row,) = work.rows()
    assert (row["commit"], row["machine"]) == ("first", "here")
    assert row["versions"] == {"torch": "1", "toy": "7"}
    assert (row["bytes"], row["bits_file"]) == (3, 2)
    assert (row["kl"], row["kl_noise_floor"]) == (0.5, 0.01)
    assert (row["settings"]["wikitext2"], row["settings"]["c4"]) == ({"windows": 3}, None)


def test_a_tool_runs_in_its_own_environment(
    pareto: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = tmp_path / "HQQ" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    monkeypatch.setenv(pareto.PEERS, str(tmp_path))
    assert pareto.interpreter("HQQ") == str(own)
    assert pareto.interpreter("pvrt") == sys.executable
    monkeypatch.delenv(pareto.PEERS)
    assert pareto.interpreter("HQQ") == sys.executable


def test_the_front_is_what_no_smaller_file_beats(protocol: ModuleType) -> None:
    tables = importlib.import_module("tables")
    shared = {
        "model": "m",
        "tool": "t",
        "bits_file": 3.0,
        "original_ppl": 20.0,
        "zero_shot": {"a": None},
    }
    optional = dict.fromkeys(("c4_ppl", "c4_kl", "greedy_equal", "decode_tokens_per_s"))
    rows = [
        {
            **shared,
            **optional,
            "method": name,
            "bytes": size,
            "kl": kl,
            "wikitext2_ppl": 25.0,
            "cpu_seconds": 1,
        }
        for name, size, kl in (("a", 10**7, 0.3), ("b", 2 * 10**7, 0.4), ("c", 3 * 10**7, 0.1))
    ]
    text = tables.pareto(rows)
    assert "**10.0**" in text and "**30.0**" in text and "| 20.0 |" in text
    assert "0.223" in text  # ln 25/20
    other = [{**rows[0], "model": "other", "bytes": 1}]  # no rival, and in a table of its own
    assert tables.pareto(other + rows) == f"{tables.pareto(other)}\n\n{text}"
