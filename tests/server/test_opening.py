"""A served folder is opened once: who reads which file, counted in a process of its own."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping

import pytest

from tests.fixtures.toy import toy_model, toy_tokenizer, write_toy, write_toy_grid
from tests.server.running import PATIENCE

# Serves every folder in turn, tests the server and ends it; prints [folder, who, file] of all that
# was opened. Who is transformers where one of its functions is on the stack, else pvrt. safetensors
# opens files in Rust, which no audit hook sees, so its door is watched too.
SERVE = """
import json, sys
from pathlib import Path

import safetensors

opened, folders = [], [Path(name) for name in sys.argv[1:]]

def note(file):
    path = Path(file)
    if path.parent in folders:
        frame, modules = sys._getframe(1), set()
        while frame is not None:
            modules.add(frame.f_globals.get("__name__", "").partition(".")[0])
            frame = frame.f_back
        who = "transformers" if "transformers" in modules else "pvrt"
        opened.append((path.parent.name, who, path.name))

def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        note(arguments[0])

def watched(file, *arguments, plain=safetensors.safe_open, **options):
    note(file)
    return plain(file, *arguments, **options)

safetensors.safe_open = watched
sys.addaudithook(hook)

from pvrt_server.launch import serve
from pvrt_server.options import ServeOptions

codes = [serve(folder, ServeOptions(engine="local", port=0, check=True)) for folder in folders]
print(json.dumps(opened))
sys.exit(any(codes))
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], Counter[str]]:
    """How often each file was opened, by folder and by who opened it."""
    place = tmp_path_factory.mktemp("opened")
    write_toy(place / "aqlm")
    write_toy_grid(place / "grid", "llama", "w4g128")
    toy_model("llama").save_pretrained(place / "sharded", max_shard_size="500KB")
    toy_tokenizer().save_pretrained(place / "sharded")
    run = subprocess.run(
        [sys.executable, "-c", SERVE, *(str(folder) for folder in sorted(place.iterdir()))],
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    counts: dict[tuple[str, str], Counter[str]] = {}
    for folder, who, file in json.loads(run.stdout.splitlines()[-1]):
        counts.setdefault((folder, who), Counter())[file] += 1
    return counts


@pytest.mark.parametrize("folder", ["aqlm", "grid", "sharded"])
def test_we_open_each_file_of_a_served_folder_once(
    folder: str, opened: Mapping[tuple[str, str], Counter[str]]
) -> None:
    ours = opened[folder, "pvrt"]
    assert {"config.json", "chat_template.jinja"} <= ours.keys()
    weights = [file for file in ours if file.endswith(".safetensors")]
    assert len(weights) > 1 if folder == "sharded" else weights == ["model.safetensors"]
    assert set(ours.values()) == {1}


@pytest.mark.parametrize("folder", ["aqlm", "grid", "sharded"])
def test_transformers_loads_a_served_folder_once(
    folder: str, opened: Mapping[tuple[str, str], Counter[str]]
) -> None:
    """config.json it reads for the model's configuration, for the tokenizer's class and, where
    there is no generation_config.json, for that. Weights are opened a second time by our quantizer,
    which transformers calls with nothing but file names."""
    its = opened[folder, "transformers"]
    assert its["tokenizer.json"] == 1
    assert its["config.json"] <= 3
    assert max(count for file, count in its.items() if file.endswith(".safetensors")) <= 2
