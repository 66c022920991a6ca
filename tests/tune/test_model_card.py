"""What `tune` leaves beside a checkpoint: report and card; and where a model says it comes from."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import yaml
from typer.testing import CliRunner

from pvrt.cli import app
from pvrt.format.aqlm import Checkpoint
from pvrt.format.grid import open_checkpoint
from pvrt_tune.data.gguf_file import begin_as_stated
from pvrt_tune.data.provenance import Provenance
from pvrt_tune.model_card import discard, model_card
from pvrt_tune.pipeline import tune
from pvrt_tune.settings import TuneJob
from pvrt_tune.settings.files import as_yaml
from tests.fixtures.toy import toy_tokenizer, write_toy
from tests.tune.test_pipeline import QUICK, dense_folder, silent

LICENCE = "---\nlicense: other\nlicense_name: toy-1\nlicense_link: LICENSE\ntags: [a]\n---\n# Toy\n"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "dense"
    dense_folder(folder, "llama-tied", torch.bfloat16)
    (folder / "README.md").write_text(LICENCE)
    (folder.parent / "quick.yaml").write_text(as_yaml(QUICK))
    return folder


def run_tune(dense: Path, out: Path, *options: str) -> Any:
    arguments = ["tune", str(dense), "-o", str(out), "--config", str(dense.parent / "quick.yaml")]
    return CliRunner().invoke(app, [*arguments, *options])


def front_matter(card: str) -> dict[str, Any]:
    front: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return front


def test_tune_leaves_a_report_and_a_card_and_makes_them_once(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_tune(dense, out)
    assert done.exit_code == 0, done.output
    card, report = (out / "README.md").read_text(), (out / "report.html").read_text()
    front = front_matter(card)
    assert front["license"] == "other" and front["license_name"] == "toy-1"
    assert front["library_name"] == "transformers" and "base_model" not in front
    assert f"scheme {Checkpoint.open(out).scheme_names}, " in card and "Install pvrt, then:" in card
    assert "| KL to the original, nats per token | noise floor 0.0" in card
    assert report.startswith("<!doctype html>") and "KL by position" in report
    written = (out / "report.html").stat().st_mtime_ns
    assert run_tune(dense, out).exit_code == 0
    assert (out / "report.html").stat().st_mtime_ns == written
    Checkpoint.open(out).verify()


def test_a_report_that_fails_does_not_lose_the_checkpoint(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: Any) -> None:
        raise MemoryError("no room for the original")

    with monkeypatch.context() as broken:
        broken.setattr("pvrt.api.describe.compared", fails)
        done = run_tune(dense, tmp_path / "out")
    assert done.exit_code == 0
    assert "the checkpoint is complete, its report is not: no room for the original" in caplog.text
    Checkpoint.open(tmp_path / "out").verify()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Figures" not in card and front_matter(card)["license"] == "other"
    assert not (tmp_path / "out" / "report.html").exists()
    assert run_tune(dense, tmp_path / "out").exit_code == 0  # the same command makes it now
    assert "## Figures" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "report.html").exists()


def test_no_report_leaves_the_folder_as_it_was(dense: Path, tmp_path: Path) -> None:
    assert run_tune(dense, tmp_path / "out", "--no-report").exit_code == 0
    assert not {"README.md", "report.html"} & {file.name for file in (tmp_path / "out").iterdir()}


def test_a_new_checkpoint_takes_the_old_ones_description_away(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tune(TuneJob(str(dense), out, QUICK), silent)
    for name in ("README.md", "report.html"):
        (out / name).write_text("of the first run")
    tune(TuneJob(str(dense), out, QUICK), silent)
    assert (out / "README.md").exists()  # complete: nothing was written
    tune(TuneJob(str(dense), out, QUICK, restart=True), silent)
    assert not (out / "README.md").exists() and not (out / "report.html").exists()
    discard(out)  # nothing there is no problem


def test_the_hubs_id_is_the_base_model_and_a_silent_source_is_said_to_be_silent(
    tmp_path: Path,
) -> None:
    write_toy(tmp_path, "llama")
    manifest = {
        "scheme": "2x8g8",
        "base_model": {"name": "toy", "sha256": "abc"},
        "data": {"origin": "a.txt", "sha256": "def"},
        "versions": [{"pvrt": "0.1", "torch": "2"}],
        "pv": {"step": 7},
    }
    (tmp_path / "pvrt.json").write_text(json.dumps(manifest))
    stored = open_checkpoint(tmp_path)
    card = model_card(stored, Provenance({}, "org/toy-1"), "pvrt tune org/toy-1 -o out", None)
    front = front_matter(card)
    assert front["base_model"] == "org/toy-1" and front["base_model_relation"] == "quantized"
    assert "license" not in front and "does not state its licence" in card
    assert "pvrt tune org/toy-1 -o out" in card and "PV-tuned for 7 steps" in card


def gguf_file(path: Path, **strings: str) -> Path:
    """A GGUF of metadata alone."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in strings.items():
        writer.add_string(f"general.{key.replace('__', '.')}", value)
    written(writer)
    return path


def written(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_states_its_licence_and_its_origin(tmp_path: Path) -> None:
    file = gguf_file(
        tmp_path / "a.gguf",
        license="apache-2.0",
        base_model__0__repo_url="https://huggingface.co/org/toy-1",
    )
    assert Provenance.of(str(file)) == Provenance({"license": "apache-2.0"}, "org/toy-1")
    silent_one = gguf_file(tmp_path / "b.gguf", source__repo_url="https://example.com/org/toy-1")
    assert Provenance.of(str(silent_one)) == Provenance({}, None)


@pytest.mark.parametrize(
    "card", ["", "# no front matter", "---\n- a list\n---\n", "---\n: {\n---\n"]
)
def test_a_card_that_states_nothing_states_nothing(tmp_path: Path, card: str) -> None:
    dense_folder(tmp_path, "llama")
    (tmp_path / "README.md").write_text(card)
    assert Provenance.of(str(tmp_path)) == Provenance({}, None)


def test_a_hub_id_is_an_origin_and_its_card_states_the_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models--org--toy-1"
    snapshot = folder / "snapshots" / "abc"
    dense_folder(snapshot, "llama")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert Provenance.of("org/toy-1") == Provenance({}, "org/toy-1")
    (snapshot / "README.md").write_text(LICENCE)
    licence = {"license": "other", "license_name": "toy-1", "license_link": "LICENSE"}
    assert Provenance.of("org/toy-1") == Provenance(licence, "org/toy-1")
    assert Provenance.of("org/nowhere") == Provenance({}, None)


@pytest.mark.parametrize("stated", [True, False, None])
@pytest.mark.parametrize("before", [True, False])
def test_a_tokenizer_begins_as_its_gguf_states(
    tmp_path: Path, stated: bool | None, before: bool
) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.add_bos_token = before
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    if stated is not None:
        writer.add_add_bos_token(stated)
    written(writer)
    begin_as_stated(tokenizer, tmp_path / "a.gguf")
    expected = before if stated is None else stated
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) is expected
    tokenizer.save_pretrained(tmp_path / "saved")
    again = type(tokenizer).from_pretrained(tmp_path / "saved")
    assert again("a")["input_ids"] == tokenizer("a")["input_ids"]
