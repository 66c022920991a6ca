"""`pvrt compare` and what `pvrt eval` measures beside perplexity, as a user calls them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pvrt.cli import app
from pvrt.errors import PvrtError
from pvrt.versions import install
from tests.fixtures.progress_bars import counted_bars
from tests.fixtures.simulated_device import TOTAL_BYTES
from tests.fixtures.toy import toy_model, toy_tokenizer, write_toy, write_toys

SMALL = ("--context", "48", "--windows", "3")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The sentence that a call ends with."""
    done = run(*arguments)
    assert isinstance(done.exception, PvrtError), done.output
    return str(done.exception)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models to compare, and a text."""
    return write_toys(tmp_path_factory.mktemp("compare"))


def test_models_are_compared_in_every_form(place: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "report.html"
    options = ("--text", place / "text.txt", *SMALL, "--prompt", "Hello", "--new-tokens", 6)
    done = run("compare", place / "dense", place / "codes", place / "grid", *options, "--json",
               "--html", page)  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    codes, grid = found["models"]
    assert (found["windows"], found["context"]) == (3, 48)
    assert codes["kl"]["mean"] < found["noise_floor"]["mean"] < grid["kl"]["mean"]
    assert codes["kl"]["same_top"] > 0.99
    assert codes["perplexity"] == pytest.approx(found["original"]["perplexity"], rel=1e-3)
    assert (codes["scheme"], grid["scheme"]) == ("2x8g8", "w4g32")
    assert codes["tokens_per_second"] > 0 and found["original"]["tokens_per_second"] > 0
    (question,) = found["questions"]
    assert question["prompt"] == "Hello"
    exact, coarse = question["answers"]
    assert exact["parting"] is None and exact["same"] == question["original"]["same"]
    assert coarse["parting"]["kl"] > 0
    assert coarse["parting"]["after_tokens"] < 6
    assert page.read_text().startswith("<!doctype html>")
    assert "report: " in done.stderr and "s left" in done.stderr


def test_no_bars_of_others_come_between_the_lines(place: Path) -> None:
    import pvrt

    with counted_bars() as bars:
        pvrt.load(place / "codes")
        assert bars == ["Loading weights"]
        options = ("--text", place / "text.txt", *SMALL)
        assert (
            run("compare", place / "dense", place / "codes", place / "grid", *options).exit_code
            == 0
        )
        assert bars == ["Loading weights"]
        pvrt.load(place / "codes")
        assert bars == 2 * ["Loading weights"]  # as before


def test_the_usual_prompts_are_questions_for_a_chat_model_alone(place: Path) -> None:
    from pvrt.tools.compare import BEGINNINGS, QUESTIONS, default_prompts, prompt_tokens

    chat, plain = toy_tokenizer(), toy_tokenizer()
    plain.chat_template = None
    assert default_prompts(chat) == QUESTIONS and default_prompts(plain) == BEGINNINGS
    assert chat.decode(prompt_tokens(chat, "Hi")) == "<|user|>Hi<|end|><|assistant|>"
    assert plain.decode(prompt_tokens(plain, "Hi")) == "Hi"


def test_a_template_that_refuses_is_one_sentence() -> None:
    from pvrt.tools.compare import prompt_tokens

    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no user') }}"
    with pytest.raises(PvrtError, match="refuses the prompt 'Hi': no user"):
        prompt_tokens(tokenizer, "Hi")


def test_characters_across_the_place_of_parting_stay_whole() -> None:
    from pvrt.tools.compare import _split

    tokens = toy_tokenizer()("für")["input_ids"]
    assert len(tokens) == 4
    assert _split(toy_tokenizer(), tokens, 2) == ("f", "ür")
    assert _split(toy_tokenizer(), tokens, 3) == ("fü", "r")


def test_what_cannot_be_compared_is_refused(place: Path, tmp_path: Path) -> None:
    dense, codes = place / "dense", place / "codes"
    assert "given twice" in refused("compare", dense, codes, codes)
    assert "already quantised" in refused("compare", codes, dense)
    assert "nowhere is not a folder" in refused("compare", dense, "nowhere")
    assert "longer than the 512 tokens" in refused("compare", dense, codes, "--context", 513)
    assert "cannot be written: it is a folder" in refused(
        "compare", dense, codes, "--html", tmp_path
    )


def test_another_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    write_toy(tmp_path / "other", "llama-tied")
    tokenizer = toy_tokenizer()
    tokenizer.add_bos_token = True
    tokenizer.save_pretrained(tmp_path / "other")
    sentence = refused("compare", place / "dense", tmp_path / "other", *SMALL)
    assert "reads the text as other tokens" in sentence


def test_a_model_that_does_not_fit_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvrt.memory.free_host_bytes", lambda: 1000)
    sentence = refused("eval", place / "dense", *SMALL)
    assert "in float32 takes 0.0 GB, and 0.0 GB are free on cpu" in sentence


def test_a_device_with_room_does_not_replace_the_host_that_decodes(
    place: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pvrt.memory.free_host_bytes", lambda: 1000)
    sentence = refused("eval", place / "grid", *SMALL, "--device", device)
    assert "grid takes 0.0 GB, and 0.0 GB are free on cpu" in sentence


def test_a_device_finds_what_the_cpu_finds(
    place: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch keeps of one model on a device is given back before the next one asks for room."""
    module, emptied = type(torch.get_device_module(device)), list[bool]()

    def free(self: Any, device: Any = None) -> tuple[int, int]:
        found = TOTAL_BYTES if emptied else 0
        emptied.clear()
        return found, TOTAL_BYTES

    monkeypatch.setattr(module, "empty_cache", lambda self: emptied.append(True))
    monkeypatch.setattr(module, "mem_get_info", free)
    monkeypatch.setattr("pvrt.api.opening._speed", lambda *asked: None)
    options = ("--text", place / "text.txt", *SMALL, "--new-tokens", 6, "--json")
    ours, theirs = (
        json.loads(run("compare", place / "dense", place / "grid", *options, *where).stdout)
        for where in ((), ("--device", device))
    )
    assert theirs["models"][0]["kl"]["mean"] == pytest.approx(
        ours["models"][0]["kl"]["mean"], rel=1e-4
    )
    answers = [
        [question["answers"][0]["same"] for question in found["questions"]]
        for found in (ours, theirs)
    ]
    assert answers[0] == answers[1]


def test_a_notice_is_given_once_for_all_models(place: Path) -> None:
    from pvrt.tools.compare import Side, shared_windows
    from pvrt.tools.held_out import HeldOut
    from pvrt.tools.sizes import Sizes

    sides = [
        Side(name, toy_tokenizer(), lambda dtype: None, Sizes(1, 1, []), longest)
        for name, longest in (("a", 64), ("b", 32), ("c", None))
    ]
    said: list[str] = []
    text = HeldOut("a text", "some words " * 30, None, 512, 2)
    assert shared_windows(text, sides[0], sides[1:], said.append).shape == (2, 32)
    assert said == ["windows have 32 tokens, for the model was made for no more"]


def test_eval_measures_kl_with_its_floor(place: Path) -> None:
    arguments = ("--kl", place / "dense", "--text", place / "text.txt", *SMALL)
    done = run("eval", place / "grid", *arguments, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["kl"]["mean"] > found["noise_floor"]["mean"] > 0
    assert found["kl"]["standard_error"] > 0 and len(found["kl"]["by_position"]) == 47
    alone = json.loads(run("eval", place / "grid", *arguments[2:], "--json").stdout)
    assert found["value"] == pytest.approx(alone["value"], rel=1e-5)
    assert (found["windows"], found["text"]) == (alone["windows"], alone["text"])
    text = run("eval", place / "grid", *arguments).stdout
    assert "KL to the original" in text and "noise floor" in text


def test_eval_cuts_or_refuses_long_windows(place: Path) -> None:
    done = run("eval", place / "codes", "--windows", 1)
    assert done.exit_code == 0 and "windows have 512 tokens" in done.stderr
    assert "@ 512 tokens, 1 windows of the Python language reference" in done.stdout
    assert "give at most --context 512" in refused("eval", place / "codes", "--context", 1024)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--limit", "5"), "are for --tasks"),
        (("--shots", "0"), "are for --tasks"),
        (("--batch", "2"), "are for --tasks"),
        (("--tasks", "a", "--context", "64"), "--tasks alone reads none"),
        (("--tasks", "a", "--windows", "4"), "--tasks alone reads none"),
        (("--kl", "MODEL"), "--kl MODEL is the model itself"),
        (("--tasks", "a,,b"), "has an empty name"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(
    options: tuple[str, ...], sentence: str
) -> None:
    assert sentence in refused("eval", "MODEL", *options)


def test_tasks_without_the_harness_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert install("eval") in refused("eval", "MODEL", "--tasks", "piqa")


def test_text_and_tasks_are_measured_on_one_load(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tasks:
        """What needs no lm-eval of its harness."""

        def __init__(self, names: list[str]) -> None:
            self.names = names

        def run(self, model: Any, *options: Any) -> dict[str, dict[str, Any]]:
            assert model(torch.tensor([[72]])).logits.shape == (1, 1, 384)
            return {name: {"items": 1} for name in self.names}

    loads: list[Any] = []
    monkeypatch.setattr("pvrt.tools.tasks.Harness", Tasks)
    monkeypatch.setattr("pvrt.api.opening._check_room", lambda *asked: loads.append(asked))
    text = ("--text", place / "text.txt", *SMALL)
    done = run("eval", place / "codes", "--tasks", "piqa", *text, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["windows"] == 3 and found["tasks"] == {"piqa": {"items": 1}}
    assert len(loads) == 1


TASK = """
task: toy_{name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two local tasks: one that the toy model has right everywhere, one that it has wrong."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = toy_model("llama"), toy_tokenizer()
    rows = []
    for number in range(6):
        question = f"Question {number}:"
        with torch.inference_mode():
            ids = torch.tensor([tokenizer(question)["input_ids"]])
            logits = model(ids).logits[0, -1]
        letters = sorted("ABCDEFGH", key=lambda letter: logits[tokenizer(letter)["input_ids"][0]])
        worst, best = letters[0], letters[-1]
        rows.append({"question": question, "choices": [worst, best]})
    for name, answer in (("right", 1), ("wrong", 0)):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps({**row, "answer": answer}) + "\n" for row in rows))
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def test_local_tasks_are_scored_without_a_network(tasks: Path) -> None:
    done = run("eval", tasks / "model", "--tasks", tasks / "tasks", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found) == {"model", "tasks"}, "no perplexity where nobody asked for it"
    scores = found["tasks"]
    assert scores["toy_right"]["acc,none"] == 1.0 and scores["toy_wrong"]["acc,none"] == 0.0
    assert scores["toy_right"]["items"] == 6
    one = run("eval", tasks / "model", "--tasks", tasks / "tasks" / "wrong.yaml", "--limit", 2)
    assert "toy_wrong acc 0.0000" in one.stdout and "(2 items)" in one.stdout
    assert "perplexity" not in one.stdout


def test_tasks_that_are_not_there_are_refused_before_a_model_is_read(tasks: Path) -> None:
    assert "gone.yaml does not exist" in refused("eval", "/nowhere", "--tasks", "gone.yaml")
    (tasks / "right.jsonl").unlink()
    task = tasks / "tasks" / "right.yaml"
    assert "lm-eval cannot run these tasks" in refused("eval", "/nowhere", "--tasks", task)
    (tasks / "empty").mkdir()
    assert "holds no task files" in refused("eval", "/nowhere", "--tasks", tasks / "empty")
