"""Checkpoints mutated at random: refused in a sentence, or loaded and able to answer.

PVRT_FUZZ is the number of mutants, from seed PVRT_FUZZ_SEED on (`make fuzz`).
"""

import json
import os
import random
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pvrt
from pvrt.errors import PvrtError
from pvrt_server.opened import open_model
from tests.fixtures.toy import write_toy, write_toy_grid

MUTANTS = int(os.environ.get("PVRT_FUZZ", "40"))
FIRST = int(os.environ.get("PVRT_FUZZ_SEED", "0"))
SECONDS = 120  # that no mutant takes unless it hangs
WEIGHTS = "model.safetensors"
VALUES: list[Any] = [
    *(None, True, 0, -1, 1, 5, 2**31, 2**63, 1e308, -0.5, "", "x", "nosuch", "\ud800x", [], {}),
    *([1, 2], {"a": 1}, [[]], ["model"], "float16", "float64", "bfloat16", 3, 127, 129, 256),
]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """Sound folders, as the bytes of their files."""
    place = tmp_path_factory.mktemp("seeds")
    write_toy(place / "codes", "qwen2", embeddings="2x8g8")
    write_toy(place / "published", "llama", published=True)
    write_toy_grid(place / "grid", "qwen3", "w4g32")
    folders = sorted(place.iterdir())
    return [{file.name: file.read_bytes() for file in each.iterdir()} for each in folders]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def edited(data: bytes, draw: random.Random) -> bytes:
    """JSON with one value changed, left out, or put in again under another key."""
    value = json.loads(data)
    container, key = draw.choice(list(places(value)))
    way = draw.randrange(4)
    if way == 0:
        del container[key]
    elif way == 1 and isinstance(container, dict):
        container[draw.choice(list(container))] = container[key]
    else:
        container[key] = draw.choice(VALUES)
    return json.dumps(value).encode()


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def header(data: bytes, draw: random.Random) -> bytes:
    """safetensors with one value of its header changed."""
    (length,) = struct.unpack("<Q", data[:8])
    changed = edited(data[8 : 8 + length], draw)
    return struct.pack("<Q", len(changed)) + changed + data[8 + length :]


def values(data: bytes, draw: random.Random) -> bytes:
    """safetensors with four bytes of its tensors set to what is no number, or is large."""
    changed = bytearray(data)
    place = draw.randrange(len(data) // 2, len(data) - 4) // 4 * 4
    number = draw.choice([float("nan"), float("inf"), -3e38, 0.0])
    changed[place : place + 4] = struct.pack("<f", number)
    return bytes(changed)


WAYS: dict[str, list[Callable[[bytes, random.Random], bytes]]] = {
    WEIGHTS: [header, header, header, values, cut, flipped],
    "config.json": [*[edited] * 6, cut, flipped],
    "generation_config.json": [edited, cut, flipped],
    "pvrt.json": [edited, cut],
}


def hang(number: int, frame: object) -> None:
    raise TimeoutError(f"a mutant took {SECONDS} seconds")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(FIRST, FIRST + MUTANTS))
def test_a_mutant_is_refused_in_a_sentence_or_answers(
    tmp_path: Path, seeds: list[dict[str, bytes]], seed: int
) -> None:
    draw = random.Random(seed)
    files = dict(draw.choice(seeds))
    name = draw.choice([name for name in WAYS for _ in WAYS[name] if name in files])
    files[name] = draw.choice(WAYS[name])(files[name], draw)
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        open_model(tmp_path)
        model = pvrt.load(tmp_path)
        with torch.inference_mode():
            logits = model(torch.tensor([[1, 2, 3]])).logits
        assert logits.shape[-1] == model.config.vocab_size
    except PvrtError as error:
        assert "\n" not in str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
