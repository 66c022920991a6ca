"""Folders whose files contradict each other, or hold what is no number: refused at every door."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pvrt
from pvrt.api.lines import silent
from pvrt.api.opening import Opener
from pvrt.errors import PvrtError
from pvrt_server.engine.engine import Engine
from pvrt_server.opened import open_model
from tests.fixtures.command_line import run
from tests.fixtures.toy import toy_model, toy_tokenizer, write_toy, write_toy_grid

NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
FIRST = "model.layers.0.input_layernorm.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


def spoiled(tensor: Tensor, value: float) -> Tensor:
    tensor.view(-1)[-1] = value
    return tensor


#: What is done to a tensor.
TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a norm of one element": (NORM, lambda t: t[:1].clone()),
    "a norm of two dimensions": (NORM, lambda t: t[None].clone()),
    "a wider norm": (FIRST, lambda t: torch.cat([t, t])),
    "a norm of integers": (NORM, lambda t: t.long()),
    "a norm of bytes": (FIRST, lambda t: t.to(torch.uint8)),
    "a transposed head": (HEAD, lambda t: t.T.contiguous()),
    "a narrower head": (HEAD, lambda t: t[:, :-8].contiguous()),
    "a shorter head": (HEAD, lambda t: t[:-1].clone()),
    "a head of booleans": (HEAD, lambda t: t > 0),
    "a shorter embedding": (EMBEDDING, lambda t: t[:-1].clone()),
    "a longer embedding": (EMBEDDING, lambda t: torch.cat([t, t])),
}
#: The same, where only reading the tensor tells.
VALUES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "NaN in a norm": (NORM, lambda t: spoiled(t, float("nan"))),
    "infinity in an embedding": (EMBEDDING, lambda t: spoiled(t, float("inf"))),
    "infinity in a head": (HEAD, lambda t: spoiled(t, -float("inf"))),
    "NaN in a bias": (BIAS, lambda t: spoiled(t, float("nan"))),
}
#: What config.json says in the place of what is true.
CONFIGS: dict[str, dict[str, Any]] = {
    "more tokens than rows": {"vocab_size": 400},
    "fewer tokens than rows": {"vocab_size": 300},
    "a wider model": {"hidden_size": 256},
    "wider heads": {"head_dim": 64},
    "other heads": {"num_attention_heads": 8},
    "a wider MLP": {"intermediate_size": 256},
    "endless layers": {"num_hidden_layers": 1 << 31},
    "no tokens": {"vocab_size": 0},
    "negative tokens": {"vocab_size": -384},
    "tokens in words": {"vocab_size": "many"},
    "an architecture by number": {"architectures": 5},
    "no heads": {"num_attention_heads": 0},
    "states by name": {"output_hidden_states": ["model"]},
    "a padding token that is not there": {"pad_token_id": 100_000},
    "an activation of no name": {"hidden_act": "nosuch"},
    "a type of no name": {"dtype": "float7"},
    "rope in words": {"rope_parameters": "yes"},
    "more layers than there are": {"num_hidden_layers": 3},
}


def write(folder: Path, layout: str) -> None:
    """A folder of an architecture with biases: in codes, its embeddings too, on grids, dense."""
    if layout == "grid":
        write_toy_grid(folder, "qwen2", "w4g32")
    elif layout == "dense":
        toy_model("qwen2").save_pretrained(folder)
        toy_tokenizer().save_pretrained(folder)
    else:
        write_toy(folder, "qwen2", embeddings="2x8g8" if layout == "ends" else None)


def refusals(folder: Path, *, verify: bool = True) -> list[str]:
    """What each door says. A door that is open, or breaks, fails the test."""
    said = []
    for door in (pvrt.load, open_model):
        with pytest.raises(PvrtError) as refused:
            door(folder)
        said.append(str(refused.value))
    if verify:
        done = run("inspect", "--verify", str(folder))
        assert done.returncode == 2, done
        said.append(done.stderr)
    return said


def write_changed(folder: Path, layout: str, which: str, change: Callable[[Any], Any]) -> str:
    """Write a folder, one of whose tensors is changed; its name."""
    write(folder, layout)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, which: change(tensors[which])}, file, metadata={"format": "pt"})
    return which


@pytest.mark.parametrize("layout", ["codes", "grid", "dense"])
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_not_the_models_is_refused(tmp_path: Path, name: str, layout: str) -> None:
    which = write_changed(tmp_path, layout, *TENSORS[name])
    for said in refusals(tmp_path, verify=layout != "dense"):
        assert which in said and "model.safetensors" in said


@pytest.mark.parametrize("layout", ["codes", "grid", "dense"])
@pytest.mark.parametrize("name", VALUES)
def test_what_is_no_number_is_refused(tmp_path: Path, name: str, layout: str) -> None:
    which = write_changed(tmp_path, layout, *VALUES[name])
    with pytest.raises(PvrtError, match=which.replace(".", r"\.")):
        pvrt.load(tmp_path)


@pytest.mark.parametrize("layout", ["codes", "ends", "grid", "dense"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_not_the_weights_is_refused(
    tmp_path: Path, name: str, layout: str
) -> None:
    write(tmp_path, layout)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **CONFIGS[name]}))
    for said in refusals(tmp_path, verify=layout != "dense"):
        assert str(tmp_path) in said and "\n" not in said.strip()


def test_names_of_two_lines_make_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, "codes")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    mixed = dict.fromkeys(
        ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size"), "mixed"
    )
    config["quantization_config"] |= {**mixed, "schemes": {"2x8g8": ["a\nb"]}}
    file.write_text(json.dumps(config))
    said = refusals(tmp_path)
    assert any("a scheme for a\\nb" in each for each in said)
    assert not any("\n" in each.strip() for each in said)


@pytest.mark.parametrize("layout", ["codes", "ends", "grid", "dense"])
def test_what_is_sound_is_not_refused(tmp_path: Path, layout: str) -> None:
    write(tmp_path, layout)
    pvrt.load(tmp_path)
    open_model(tmp_path)
    if layout != "dense":
        assert run("inspect", "--verify", str(tmp_path)).returncode == 0


CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
from transformers import PreTrainedTokenizerFast as Tokenizer
"""


@pytest.mark.parametrize("kind", ["qwen2", "nobody-knows"])
@pytest.mark.parametrize("layout", ["codes", "grid", "dense"])
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, layout: str
) -> None:
    asked = Mock(return_value="y")
    monkeypatch.setattr("builtins.input", asked)
    folder, marker = tmp_path / "model", tmp_path / "ran"
    write(folder, layout)
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    changes = {
        "config.json": {"model_type": kind, "auto_map": classes},
        "tokenizer_config.json": {
            "tokenizer_class": "Nobodys",
            "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]},
        },
    }
    for name, change in changes.items():
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    doors: list[Callable[[Path], object]] = [
        pvrt.load,
        Engine.load,
        lambda path: Opener("cpu", None, silent).folder(path),
    ]
    for door in doors:
        with suppress(PvrtError):  # kinds that transformers knows need no code
            door(folder)
    if layout != "dense":
        run("inspect", "--verify", str(folder))
    assert not asked.called and not marker.exists()


def test_folders_with_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        folder = tmp_path / name.partition(".")[0]
        write(folder, "codes")
        (folder / name).unlink(missing_ok=True)
        if name == "tokenizer.json":
            (folder / name).symlink_to("/dev/zero")
        else:
            os.mkfifo(folder / name)
        for said in refusals(folder):
            assert f"{name} is neither a file nor a folder" in said


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{", "[]", "\x00", "nul"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_files_that_are_no_json_are_refused(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path, "codes")
    (tmp_path / name).write_text(text)
    doors: dict[str, Callable[[Path], object]] = {
        "config.json": open_model,
        "generation_config.json": pvrt.load,
        "tokenizer.json": Engine.load,
    }
    with pytest.raises(PvrtError) as refused:
        doors[name](tmp_path)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)
