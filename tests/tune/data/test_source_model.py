"""Models read tensor by tensor: the same as transformers reads whole, or one clear sentence."""

import hashlib
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pvrt.errors import CheckpointError, SourceError
from pvrt_tune.data import hub
from pvrt_tune.data.locate import locate
from pvrt_tune.data.source_model import load_skeleton, load_source
from tests.fixtures.toy import ARCHITECTURES, toy_model, toy_tokenizer


def written(folder: Path, architecture: str, **options: str) -> Path:
    toy_model(architecture).to(torch.bfloat16).save_pretrained(folder, **options)
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_whole_is_what_transformers_reads(tmp_path: Path, architecture: str) -> None:
    folder = written(tmp_path, architecture, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model = load_source(str(folder)).dense()
    assert model.dtype is torch.bfloat16
    assert model.generation_config == expected.generation_config
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(model, kind)()), dict(getattr(expected, kind)())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_opening_reads_no_weights_and_leaves_the_skeleton_empty(tmp_path: Path) -> None:
    source = load_source(str(written(tmp_path, "llama")))
    source.load("model.layers.1", "cpu", torch.float32)
    source.read(["model.norm.weight"])
    assert all(parameter.is_meta for parameter in source.model.parameters())


def test_a_loaded_block_is_free_to_be_changed(tmp_path: Path) -> None:
    source = load_source(str(written(tmp_path, "llama")))
    before = (tmp_path / "model.safetensors").read_bytes()
    block = source.load("model.layers.0", "cpu", torch.bfloat16)
    for parameter in block.parameters():
        parameter.data.zero_()
    again = source.load("model.layers.0", "cpu", torch.bfloat16)
    assert all(bool(parameter.any()) for parameter in again.parameters())
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_missing_tensor_is_named_and_not_made_up(tmp_path: Path) -> None:
    file = written(tmp_path, "llama") / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"holds no weights for model\.layers\.1\.mlp\.up_proj"):
        load_source(str(tmp_path))


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, "llama") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"model\.norm\.weight has shape \[127\], .* \[128\]"):
        load_source(str(tmp_path))


def test_the_digest_is_sha256sum_of_the_files(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama-tied")
    lines = "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("config.json", "model.safetensors")
    )
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert load_source(str(folder)).digest == expected


def test_a_skeleton_needs_no_weights(tmp_path: Path) -> None:
    folder = written(tmp_path, "gemma3_text")
    (folder / "model.safetensors").unlink()
    model = load_skeleton(str(folder))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.dtype is torch.bfloat16


def test_a_name_in_a_folder_that_is_here_is_not_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "cached_file", Mock(side_effect=AssertionError("the hub was asked")))
    for name in ("models/typo", "models/", "./typo", "a/b/c"):
        with pytest.raises((SourceError, CheckpointError), match=r"does not exist|is missing"):
            locate(name)
    with pytest.raises(SourceError, match="the hub was asked"):
        locate("owner/name")
