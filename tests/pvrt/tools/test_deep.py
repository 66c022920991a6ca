"""`inspect --deep`: layers by this machine's kernels, and greedy tokens against pvrt.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from pvrt.errors import CheckpointError, RunError
from pvrt.format.grid import open_checkpoint
from pvrt.format.write import add_to_manifest
from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt.tools import deep
from pvrt_kernels.cpu import library
from tests.fixtures.toy import toy_tokenizer, write_toy, write_toy_grid

FOLDERS: dict[str, tuple[Callable[[Path], object], int]] = {
    "codes": (lambda path: write_toy(path, "qwen2"), 1),
    "several schemes": (
        lambda path: write_toy(path, embeddings="2x8g4", schemes={"v_proj": "4x8g8"}),
        3,
    ),
    "experts": (lambda path: write_toy(path, "mixtral"), 1),
    "16 bits": (lambda path: write_toy(path, published=True), 1),
    "grid": (lambda path: write_toy_grid(path, "qwen2", "w4g32"), 1),
}


def note(folder: Path) -> dict[str, list[int]]:
    """Write greedy tokens into a folder's manifest, as a run does."""
    done: list[int] = []
    model = deep.load_for_check(open_checkpoint(folder))
    found = deep.greedy(model, toy_tokenizer(), lambda at, of: done.append(at))
    assert done == [*range(1, deep.TOKENS + 1)]
    if not (folder / "pvrt.json").exists():
        (folder / "pvrt.json").write_text("{}")
    add_to_manifest(folder, **{deep.GREEDY: found})
    return found


@pytest.mark.parametrize("name", FOLDERS)
def test_a_sound_folder_computes_what_it_was_written_with(tmp_path: Path, name: str) -> None:
    write, schemes = FOLDERS[name]
    write(tmp_path)
    stored = open_checkpoint(tmp_path)
    before = deep.check_deep(stored)
    assert before["greedy_tokens"] is None and "holds none" in deep.as_text(before)
    note(tmp_path)
    for isa in library.usable_instruction_sets():
        with library.using(isa):
            found = deep.check_deep(stored)
        assert found["greedy_tokens"] == deep.TOKENS
        assert len(found["layers"]) == schemes
        assert all(0 <= layer["error"] < 1e-4 for layer in found["layers"])
        assert found["layers"][0]["name"] in deep.as_text(found)
    open_checkpoint(tmp_path).verify()


@pytest.mark.parametrize(("context", "lengths"), [(20, (4, 16)), (8, (1, 7)), (512, (16, 16))])
def test_prompt_and_tokens_fit_the_context(
    tmp_path: Path, context: int, lengths: tuple[int, int]
) -> None:
    write_toy(tmp_path)
    file = tmp_path / "config.json"
    config = {**json.loads(file.read_text()), "max_position_embeddings": context}
    file.write_text(json.dumps(config))
    stored = open_checkpoint(tmp_path)
    found = deep.greedy(deep.load_for_check(stored), toy_tokenizer(), lambda at, of: None)
    assert (len(found["prompt"]), len(found["tokens"])) == lengths
    add_to_manifest(tmp_path, greedy=found)
    assert deep.check_deep(stored)["greedy_tokens"] == lengths[1]


def test_tokens_that_the_model_would_not_give_are_refused(tmp_path: Path) -> None:
    write_toy(tmp_path)
    found = note(tmp_path)
    for at in (0, 7, deep.TOKENS - 1):
        tokens = [*found["tokens"]]
        tokens[at] = (tokens[at] + 1) % 256
        add_to_manifest(tmp_path, greedy={**found, "tokens": tokens})
        with pytest.raises(
            CheckpointError, match=rf"greedy token {at + 1} is {found['tokens'][at]}"
        ):
            deep.check_deep(open_checkpoint(tmp_path))


def test_a_kernel_that_computes_something_else_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_toy(tmp_path)

    def forward(self: AQLMLinear, x: Tensor) -> Tensor:
        return self.product(x) * (1.01 if x.shape[-2] == 1 else 1)

    monkeypatch.setattr(AQLMLinear, "forward", forward)
    with pytest.raises(CheckpointError, match=r"is 1\.0e-02 of its size away"):
        deep.check_deep(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    "noted",
    [
        5,
        [],
        {},
        {"prompt": [1]},
        {"prompt": [1], "tokens": []},
        {"prompt": [1], "tokens": [True]},
        {"prompt": [1], "tokens": [-1]},
        {"prompt": [384], "tokens": [1]},
        {"prompt": ["a"], "tokens": [1]},
        {"prompt": [1], "tokens": [1] * 1001},
        {"prompt": [1] * 300, "tokens": [1] * 300},
    ],
)
def test_a_manifest_that_holds_no_tokens_there_is_refused(tmp_path: Path, noted: Any) -> None:
    write_toy(tmp_path)
    add_to_manifest(tmp_path, greedy=noted)
    with pytest.raises(CheckpointError, match=r"pvrt\.json: greedy must hold"):
        deep.check_deep(open_checkpoint(tmp_path))


def test_too_little_memory_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toy(tmp_path)
    monkeypatch.setattr(deep, "free_host_bytes", lambda: 1000)
    with pytest.raises(RunError, match=r"in float32, and 0\.0 GB are free"):
        deep.check_deep(open_checkpoint(tmp_path))


def test_what_is_noted_stands_beside_the_rest(tmp_path: Path) -> None:
    write_toy(tmp_path)
    before = json.loads((tmp_path / "pvrt.json").read_text())
    found = note(tmp_path)
    assert json.loads((tmp_path / "pvrt.json").read_text()) == {**before, deep.GREEDY: found}
    assert sorted(file.name for file in tmp_path.glob(".*")) == []
