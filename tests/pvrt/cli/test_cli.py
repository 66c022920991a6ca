"""The command line as a user meets it: exit codes, one sentence on stderr, JSON on stdout."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, get_args, get_type_hints

import pytest
import typer

import pvrt
from pvrt.api.arguments import Activations, Effort
from pvrt.cli import app
from pvrt.lock import Comparison, compare
from pvrt.tools import doctor
from pvrt.tools.doctor import Finding, examine
from pvrt_kernels.cpu import library
from tests.fixtures.command_line import run
from tests.fixtures.toy import toy_model, toy_tokenizer, write_toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "toy"
    write_toy(path, "llama-tied")
    return path


def test_a_process_prints_the_version_or_one_sentence_and_ends_by_its_exit_code() -> None:
    """The other tests call what `python -m pvrt` calls."""
    for arguments, ended in (
        (("--version",), (0, f"pvrt {pvrt.__version__}\n", "")),
        (("tune", "a", "-o", "x", "--samples", "many"), (2, "", "Invalid value for '--samples'")),
        (("serve", "a", "--port", "70000"), (2, "", "pvrt: --port is 70000; it must be at most")),
    ):
        command = [sys.executable, "-m", "pvrt", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == ended[:2], (arguments, done.stderr)
        assert ended[2] in done.stderr and "Traceback" not in done.stderr, arguments


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for command in ("tune", "plan", "serve", "eval", "compare", "inspect", "bench", "doctor"):
        assert command in text


def options(command: str) -> set[str]:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {parameter.name for parameter in commands[command].params}


def test_plan_takes_every_option_of_tune_that_a_plan_depends_on() -> None:
    assert options("tune") - options("plan") == {
        *("seed", "resume", "restart", "force", "report", "dry_run", "quiet")
    }
    assert options("plan") - options("tune") == {"host_memory", "device_memory", "card"}


def test_the_choices_of_tune_are_those_of_its_settings() -> None:
    from pvrt_tune.settings import EFFORTS, TuneJob

    assert set(get_args(Effort)) == EFFORTS.keys()
    places = get_args(get_type_hints(TuneJob)["activations"])
    assert get_args(Activations) == places


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("inspect", "nowhere"), "nowhere is not a folder"),
        (("tune", "/nowhere/model", "-o", "x"), "/nowhere/model does not exist"),
        (("tune", "a", "-o", "x", "--scheme", "2bit"), "'2bit' is not a scheme"),
        (("tune", "a", "-o", "x", "--device", "cuda:9"), "--device cuda:9 cannot be used"),
        (("plan", "a", "--device", "gpu"), "there is no device 'gpu'"),
        (("tune", "a", "-o", "x", "--device", "gpu"), "there is no device 'gpu'"),
        (("tune", "a", "-o", "x", "--device", "meta"), "there is no device 'meta'"),
        (("plan", "a", "--for", "soon"), "--for soon is not a time"),
        (("plan", "a", "--for", "1h", "--no-pv"), "--for limits PV-Tuning"),
        (("plan", "a", "--config", "/nowhere.yaml"), "/nowhere.yaml"),
        (("tune", "a", "-o", "x", "--resume", "--restart"), "exclude each other"),
        (("eval", "/nowhere"), "/nowhere does not exist"),
        (("serve", "nowhere"), "nowhere is not a folder"),
        (("bench", "nowhere"), "nowhere is not a folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: tuple[str, ...], sentence: str
) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_instruction_set_that_is_not_there_is_refused_before_anything_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PVRT_CPU_ISA", "avx512")
    monkeypatch.setattr(library, "library", library.library.__wrapped__)  # as if not yet loaded
    for command in (["inspect", "nowhere"], ["doctor"]):
        done = run(*command)
        assert done.returncode == 2
        assert done.stderr.startswith("pvrt: PVRT_CPU_ISA is 'avx512', which cannot be used here: ")
        assert len(done.stderr.splitlines()) == 1


def test_inspect_prints_true_bits_and_what_is_dense(folder: Path) -> None:
    text = run("inspect", str(folder), "--verify").stdout
    assert "2x8g8, " in text and "14 quantised layers" in text
    assert "model.embed_tokens.weight" in text
    text = run("inspect", str(folder), "--deep").stdout
    assert "decoded           model.layers." in text and "pvrt.json holds none" in text
    report = json.loads(run("inspect", str(folder), "--json").stdout)
    assert report["bits_per_weight_file"] > report["bits_per_weight_linears"] > 2
    assert report["dense_bytes"] < report["file_bytes"]


def test_eval_measures_a_checkpoint_and_a_dense_model_alike(folder: Path, tmp_path: Path) -> None:
    """The quantised toy and the dense model that it stands for have the same perplexity."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    dense = tmp_path / "dense"
    write_toy(tmp_path / "again", "llama-tied").save_pretrained(dense)
    toy_tokenizer().save_pretrained(dense)
    values = []
    for model in (folder, dense):
        done = run("eval", str(model), "--text", str(text), "--context", "64", "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert (result["context"], result["windows"]) == (64, 900 // 64)
        values.append(result["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_eval_reads_the_text_before_the_model(tmp_path: Path) -> None:
    done = run("eval", str(tmp_path / "no model"), "--text", str(tmp_path / "no text"))
    assert done.returncode == 2
    assert "no text" in done.stderr and "no model" not in done.stderr


def test_eval_without_enough_text_says_so(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    done = run("eval", str(folder), "--text", str(tmp_path / "short.txt"), "--context", "64")
    assert done.returncode == 2
    assert "the text has 5 tokens, one window needs 64" in done.stderr


def test_bench_measures_models_prompts_and_depths_in_one_call(folder: Path) -> None:
    tests = ("-p", "16,32", "-n", "8", "-d", "0,32", "-r", "2")
    done = run("bench", str(folder), *tests, "-o", "json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    names = ["pp16", "pp32", "tg8"]
    assert [row["test"] for row in rows] == [*names, *(f"{name} @ d32" for name in names)]
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for row in rows:
        low, high = row["tokens_per_second_p10"], row["tokens_per_second_p90"]
        assert 0 < low <= row["tokens_per_second"] <= high
        assert row["model_size"] == stored
        if row["n_gen"]:
            read = row["tokens_per_second"] * row["bytes_per_token"] / row["bytes_per_second"]
            assert row["bandwidth_fraction"] == pytest.approx(read)
            assert stored / 2 < row["bytes_per_token"] < stored


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("-p", "many"), "-p many is not a list of whole numbers"),
        (("-p", "0", "-n", "0"), "leaves nothing to measure"),
        (("-d", "100000"), "maximum context length"),
    ],
)
def test_bench_refuses_what_cannot_be_measured(
    folder: Path, options: tuple[str, ...], sentence: str
) -> None:
    done = run("bench", str(folder), *options)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr


def test_bench_opens_all_models_before_it_measures_one(folder: Path) -> None:
    done = run("bench", str(folder), "nowhere")
    assert done.returncode == 2 and "nowhere is not a folder" in done.stderr
    assert not done.stdout


def test_shells_complete_commands_and_options() -> None:
    """What typer's script for bash asks for."""
    for words, completed in (("pvrt be", "bench"), ("pvrt tune --eff", "--effort")):
        asked = {"_PVRT_COMPLETE": "complete_bash", "COMP_WORDS": words}
        asked["COMP_CWORD"] = str(len(words.split()) - 1)
        code = "import sys; sys.argv = ['pvrt']; from pvrt.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True
        )
        assert completed in done.stdout.split(), done


def test_doctor_finds_this_machine_sound_and_names_what_it_checked() -> None:
    done = run("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    for name in ("python", "torch", "transformers", "triton", "vllm", "compiler", "kernels"):
        assert name in findings
    assert findings["torch"]["level"] == "ok"
    problems = [finding for finding in findings.values() if finding["level"] == "problem"]
    assert done.returncode == (1 if problems else 0)
    assert all(finding["remedy"] for finding in problems)
    assert "lock" in findings and findings["cpu kernels"]["text"]


def test_doctor_counts_the_packages_that_differ_from_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "constraints.txt"
    found = version("packaging")
    lock.write_text(
        f"# make lock\npackaging=={found}\npytest==0.1  # old\nnever-installed==1.0\n"
        "typer==0.1 ; python_full_version < '3'\n"
    )
    assert compare(lock) is None, "somebody else's file"
    (tmp_path / "pyproject.toml").touch()
    assert compare(lock) == Comparison(2, (f"pytest {version('pytest')} (0.1)",))
    assert compare(tmp_path / "absent.txt") is None


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError("2 active drivers"), "pip install --force-reinstall torch triton"),
        (RuntimeError("Failed to find C compiler"), "apt-get install gcc python3-dev"),
        (subprocess.CalledProcessError(1, "gcc"), "apt-get install gcc python3-dev"),
        (FileNotFoundError("no/such/cc"), "apt-get install gcc python3-dev"),
        (ImportError("libtriton.so"), "pip install --force-reinstall torch triton"),
    ],
)
def test_doctor_says_why_triton_cannot_reach_a_gpu(
    monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str
) -> None:
    """With a GPU, Triton compiles a small C program on first use."""

    class Driver:
        @property
        def active(self) -> NoReturn:
            raise error

    monkeypatch.setattr("triton.runtime.driver", Driver())
    monkeypatch.setattr(doctor, "_driver", lambda: "580.65")
    found = next(f for f in examine() if f.name == "triton")
    assert (found.level, found.remedy) == ("problem", remedy)
    assert str(error).split("\n")[0] in found.text


def test_doctor_sees_a_filter_that_leaves_the_plugin_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    finding = next(f for f in examine() if f.name == "vllm plugin")
    assert finding == Finding(
        "vllm plugin",
        "problem",
        "VLLM_PLUGINS='other' leaves pvrt out: AQLM would be an unknown method",
        "export VLLM_PLUGINS=other,pvrt",
    )


def test_doctor_sees_a_folder_that_shadows_the_kernels_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert next(f for f in examine() if f.name == "kernels").level == "ok"
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert next(f for f in examine() if f.name == "kernels").level == "problem"


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    import torch

    from pvrt.tools.perplexity import perplexity, windows

    model = toy_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    tokens = windows("some words " * 30, toy_tokenizer(), 32)
    assert perplexity(model, tokens).value == pytest.approx(model.config.vocab_size, rel=1e-4)
