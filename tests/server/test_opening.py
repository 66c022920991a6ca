"""A served folder is opened once: who reads which file, as Python itself notes it."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors

from pvrt_server.launch import serve
from pvrt_server.options import ServeOptions
from tests.fixtures.toy import toy_model, toy_tokenizer, write_toy, write_toy_grid

Opened = Mapping[tuple[str, str], Counter[str]]


@contextmanager
def watched(place: Path, counts: dict[tuple[str, str], Counter[str]]) -> Iterator[None]:
    """Count what is opened in the folders of a place, by folder and by who opens it.

    Who is transformers where one of its functions is on the stack, else pvrt. safetensors opens
    files in Rust, which no audit hook sees, so its door is watched too, by all its names.
    """
    watching, plain = True, safetensors.safe_open

    def note(name: object) -> None:
        file = Path(str(name))
        if file.parent.parent != place:
            return
        frame, modules = sys._getframe(1), set()
        while frame is not None:
            modules.add(frame.f_globals.get("__name__", "").partition(".")[0])
            frame = frame.f_back  # type: ignore[assignment]
        who = "transformers" if "transformers" in modules else "pvrt"
        counts.setdefault((file.parent.name, who), Counter())[file.name] += 1

    def hook(event: str, arguments: Any) -> None:  # which no one can take away again
        if watching and event == "open" and isinstance(arguments[0], str):
            note(arguments[0])

    def door(file: Any, *arguments: Any, **options: Any) -> Any:
        note(file)
        return plain(file, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        for module in list(sys.modules.values()):
            if vars(module).get("safe_open") is plain:
                patch.setattr(module, "safe_open", door)
        sys.addaudithook(hook)
        yield
        watching = False


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """How often each file was opened, by folder and by who opened it."""
    place = tmp_path_factory.mktemp("opened").resolve()
    write_toy(place / "aqlm")
    write_toy_grid(place / "grid", "llama", "w4g128")
    toy_model("llama").save_pretrained(place / "sharded", max_shard_size="500KB")
    toy_tokenizer().save_pretrained(place / "sharded")
    counts: dict[tuple[str, str], Counter[str]] = {}
    with watched(place, counts):
        for folder in sorted(place.iterdir()):
            assert serve(folder, ServeOptions(engine="local", port=0, check=True)) == 0, folder
    return counts


@pytest.mark.parametrize("folder", ["aqlm", "grid", "sharded"])
def test_we_open_each_file_of_a_served_folder_once(folder: str, opened: Opened) -> None:
    ours = opened[folder, "pvrt"]
    assert {"config.json", "chat_template.jinja"} <= ours.keys()
    weights = [file for file in ours if file.endswith(".safetensors")]
    assert len(weights) > 1 if folder == "sharded" else weights == ["model.safetensors"]
    assert set(ours.values()) == {1}


@pytest.mark.parametrize("folder", ["aqlm", "grid", "sharded"])
def test_transformers_loads_a_served_folder_once(folder: str, opened: Opened) -> None:
    """config.json it reads for the model's configuration, for the tokenizer's class and, where
    there is no generation_config.json, for that. Weights are opened a second time by our quantizer,
    which transformers calls with nothing but file names."""
    its = opened[folder, "transformers"]
    assert its["tokenizer.json"] == 1
    assert its["config.json"] <= 3
    assert max(count for file, count in its.items() if file.endswith(".safetensors")) <= 2
