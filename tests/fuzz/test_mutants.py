"""Mutants of everything that is read from outside: refused in a sentence, or rightly accepted.

PVRT_FUZZ is the number of mutants of each kind, from seed PVRT_FUZZ_SEED on. `make fuzz` tries
thousands, and tells as it goes what became of them.
"""

import json
import os
import random
import struct
from pathlib import Path

import pytest
from safetensors.torch import save

from pvrt.errors import PvrtError
from tests.fixtures.gguf_model import write_gguf
from tests.fuzz import mutations
from tests.fuzz.kinds import KINDS
from tests.fuzz.trials import WronglyAccepted, run

MUTANTS = int(os.environ.get("PVRT_FUZZ", "25"))
FIRST = int(os.environ.get("PVRT_FUZZ_SEED", "0"))


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_are_refused_in_a_sentence_or_rightly_accepted(kind: str) -> None:
    counts = run(KINDS[kind], range(FIRST, FIRST + MUTANTS))
    assert not counts.faults
    assert sum(counts.outcomes.values()) == MUTANTS and counts.outcomes["refused"]


class Harmful:
    """A kind whose readers do what theirs must not, by the seed."""

    def __init__(self, place: Path) -> None:
        self.seed = 0

    def mutant(self, seed: int, folder: Path) -> str:
        self.seed = seed
        return str(seed)

    def read(self, folder: Path) -> None:
        match self.seed:
            case 1:
                raise PvrtError("a sentence")
            case 2:
                raise PvrtError("two\nlines")
            case 3:
                raise KeyError("a")
            case 4:
                os.kill(os.getpid(), 11)
            case 5:
                while True:
                    pass
            case 6:
                raise WronglyAccepted("it is not")


def test_whatever_a_reader_does_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.trials.CPU_SECONDS", 4)
    counts = run(Harmful, range(8))
    assert counts.outcomes == {
        "accepted": 2,
        "refused": 1,
        "traceback": 2,
        "crash": 1,
        "hang": 1,
        "wrongly accepted": 1,
    }
    assert [seed for seed, *_ in counts.faults] == [2, 3, 4, 5, 6]


def test_a_seed_makes_the_same_mutant_again(tmp_path: Path) -> None:
    kind = KINDS["recipes"](tmp_path / "seeds")
    for seed in (3, 50, 51):
        made = []
        for name in ("a", "b"):
            (tmp_path / f"{name}{seed}").mkdir()
            kind.mutant(seed, tmp_path / f"{name}{seed}")
            made.append((tmp_path / f"{name}{seed}" / "recipe.yaml").read_bytes())
        assert made[0] == made[1]


def test_changes_keep_to_the_format(tmp_path: Path) -> None:
    import torch

    gguf = write_gguf(tmp_path / "model.gguf").read_bytes()
    fields = list(mutations.gguf_fields(gguf))
    assert struct.unpack_from("<I", gguf, fields[0][0]) == (3,) and len(fields) > 100
    tensors = save({"a": torch.zeros(64), "b": torch.ones(3)})
    for seed in range(30):
        draw = random.Random(seed)
        assert len(mutations.gguf_number(gguf, draw)) == len(gguf)
        changed = mutations.safetensors_header(tensors, draw)
        (length,) = struct.unpack("<Q", changed[:8])
        json.loads(changed[8 : 8 + length])
        assert changed[8 + length :] == tensors[-67 * 4 :]
