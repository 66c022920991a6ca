"""Ranks: joining, stopping, dealing, choosing, and pieces of a run that are cut over them.

Three gloo processes run once; what they learn together is in pv/test_ranks.py.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from pvrt.errors import RunError
from pvrt_tune import parallel, pipeline, shards
from pvrt_tune.data.text import CalibrationData
from pvrt_tune.parallel import Group, Rows, joined, top_share
from pvrt_tune.settings import Recipe, TuneJob
from pvrt_tune.store import Store
from tests.fixtures.ranks import COUNTS, RANKS, SIZES, is_read, tensors
from tests.fixtures.toy import toy_model, toy_tokenizer


def largest(scores: torch.Tensor, count: int) -> list[int]:
    indices, chosen = top_share(scores, count)
    return indices[chosen].tolist()


@pytest.mark.parametrize("count", [1, 37, 999, 1000, 2000])
def test_the_largest_scores_are_found(count: int) -> None:
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(count))
    expected = set(scores.topk(min(count, 1000)).indices.tolist())
    found = largest(scores, count)
    assert set(found) == expected and len(found) == len(expected)


def test_scores_that_are_not_positive_are_left_out() -> None:
    scores = torch.tensor([0.0, 3.0, -1.0, 2.0, 0.0, 1.0])
    assert set(largest(scores, 5)) == {1, 3, 5}
    assert largest(torch.zeros(8), 3) == largest(torch.empty(0), 3) == []


def test_a_clusters_world_size_alone_is_no_call_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in parallel._TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    lines: list[str] = []
    with joined("cpu", lines.append) as group:
        assert (group.device, parallel.world()) == ("cpu", 1)
        assert group.first(lambda: "alone") == "alone"
    assert lines == [
        "WORLD_SIZE is 8, but torchrun did not start this process: it tunes alone",
    ]
    assert parallel.speaks()


def test_a_first_process_without_a_sign_of_life_ends_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel, "_SILENCE", 0.3)
    store = HashStore()
    with pytest.raises(RunError, match="no sign of life"):
        Group("cpu", store)._wait("first 0", store)


# ---- three processes ----

SCRIPT = """
import json, os, signal, sys; sys.path[:0] = {paths!r}
from pathlib import Path
import torch
from pvrt.errors import RunError
from pvrt_tune import parallel, shards
from pvrt_tune.store import Store
from tests.fixtures.ranks import COUNTS, SIZES, gathered, is_read, raised, tensors
signal.signal(signal.SIGINT, signal.default_int_handler)
folder = Path({folder!r})

def fail_on_1():
    if parallel.rank() == 1:
        raise RunError("the disk of rank 1 is full")

def interrupt():
    raise KeyboardInterrupt

def steps():
    with parallel.held_signals():
        if parallel.rank() == 2:
            os.kill(os.getpid(), signal.SIGINT)
        for step in range(1000):
            found["steps"] = step
            parallel.stop_if_asked()

found = {{}}
with parallel.joined("cpu", print) as group:
    found["dealt"] = [parallel.dealt(range(n), size) for n in COUNTS for size in SIZES]
    found["gathered"] = gathered()
    state = Store(folder, writes=parallel.rank() == 0)
    shards.save(state, "of-three-1", tensors(1), {{"from": 3}})
    shards.save(state, "of-three-2", tensors(2), {{"from": 3}})
    if parallel.rank() == 2:
        os.truncate(state.file("of-three-2", 2), 9)
    found["newest"] = shards.newest(state, "of-three-")
    found["read"] = is_read(state, "of-one", tensors(5))
    found["agreed"] = parallel.agreed(f"said by {{parallel.rank()}}")
    found["together"] = parallel.together(parallel.rank)
    found["failed"] = raised(lambda: parallel.together(fail_on_1))
    full = Store(folder / "full", writes=parallel.rank() == 0)
    found["not noted"] = raised(lambda: shards.save(full, "of-three-1", tensors(1), {{}}))
    found["stopped"] = raised(steps)
    found["first"] = group.first(lambda: "made")
    found["first failed"] = raised(lambda: group.first(lambda: 1 / 0))
    found["first interrupted"] = raised(lambda: group.first(interrupt))
    (folder / f"{{parallel.rank()}}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where three processes left what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    shards.save(Store(folder), "of-one", tensors(5), {"from": 1})
    (folder / "full" / "journal.jsonl").mkdir(parents=True)  # nothing can be appended to it
    script = folder / "rank.py"
    script.write_text(SCRIPT.format(paths=sys.path, folder=str(folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={RANKS}", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each of three processes found."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def test_windows_are_dealt_once_in_as_many_passes_on_every_rank(
    found: list[dict[str, Any]],
) -> None:
    cases = [(count, size) for count in COUNTS for size in SIZES]
    for number, (count, size) in enumerate(cases):
        hands = [one["dealt"][number] for one in found]
        assert len({len(hand) for hand in hands}) == 1
        passes = [one for hand in hands for one in hand]
        worked = [(item, share / len(items)) for items, share in passes if share for item in items]
        assert sorted(item for item, _ in worked) == list(range(count))
        assert all(share == pytest.approx(1 / count) for _, share in worked)
        assert all(0 < len(items) <= size for items, _ in passes)


def test_rank_0_alone_gathers_rows_of_every_type(found: list[dict[str, Any]]) -> None:
    wholes = [rows.local.flatten().tolist() for rows in tensors(4).values()]
    assert [one["gathered"] for one in found] == [wholes, [], []]


def test_one_process_reads_what_three_saved_and_the_other_way_round(
    folder: Path, found: list[dict[str, Any]]
) -> None:
    assert all(one["read"] for one in found)
    state = Store(folder)
    assert state.parts("of-three-1") == RANKS
    assert state.report("of-three-1") == {"from": 3}
    assert is_read(state, "of-three-1", tensors(1))
    # One process cuts nothing: all is whole to it.
    assert is_read(state, "of-three-1", {n: Rows(r.local, None) for n, r in tensors(1).items()})
    sizes = [state.file("of-three-1", part).stat().st_size for part in range(RANKS)]
    assert max(sizes) < state.file("of-one").stat().st_size


def test_a_piece_with_a_damaged_part_is_passed_over_by_all(
    folder: Path, found: list[dict[str, Any]]
) -> None:
    assert [one["newest"] for one in found] == ["of-three-1"] * RANKS
    state = Store(folder)
    assert state.report("of-three-2") is None
    assert shards.newest(state, "of-three-") == "of-three-1"


def test_pieces_of_another_version_are_refused_with_a_sentence(folder: Path) -> None:
    more = tensors(5) | {"optimizer/a/news": Rows(torch.zeros(1), None)}
    with pytest.raises(RunError, match="other things; start again with --restart"):
        shards.fill(Store(folder), "of-one", more)


def test_names_of_one_level_are_still_read(tmp_path: Path) -> None:
    """As version 0.1 saved them."""
    state = Store(tmp_path)
    names = ("a.codes", "a.latent", "norm", "a.codebooks")
    old = {name: rows.local for name, rows in zip(names, tensors(1).values(), strict=True)}
    state.save("old", old, {})
    assert is_read(state, "old", tensors(1))


def test_what_one_rank_fails_at_stops_all_with_its_sentence(found: list[dict[str, Any]]) -> None:
    assert [one["failed"] for one in found] == ["RunError: the disk of rank 1 is full"] * RANKS


def test_a_journal_that_rank_0_cannot_write_stops_all(found: list[dict[str, Any]]) -> None:
    (said,) = {one["not noted"] for one in found}
    assert said.startswith("RunError: cannot save of-three-1 to ")


def test_a_rank_that_does_not_see_the_output_folder_says_so(tmp_path: Path) -> None:
    data = CalibrationData(torch.zeros(1, 8, dtype=torch.long), "text")
    toy_model("llama").save_pretrained(tmp_path / "toy")
    toy_tokenizer().save_pretrained(tmp_path / "toy")
    job = TuneJob(str(tmp_path / "toy"), tmp_path / "elsewhere", Recipe())
    with pytest.raises(RunError, match="give an output folder that all processes see"):
        pipeline._follow(job.device, (data, job, {}))


def test_a_rank_that_only_reads_leaves_half_a_line_to_the_one_that_writes(tmp_path: Path) -> None:
    """It may look while the first rank's line is under way to a network disk."""
    journal = tmp_path / "journal.jsonl"
    journal.write_text('{"event": "calibrated"}\n{"event": "pie')
    assert Store(tmp_path, writes=False).calibrated
    assert journal.read_text().endswith("pie")
    assert Store(tmp_path).calibrated
    assert journal.read_text().endswith("}\n")


def test_a_signal_to_one_rank_stops_all_at_the_same_step(found: list[dict[str, Any]]) -> None:
    assert [one["stopped"] for one in found] == ["KeyboardInterrupt: "] * RANKS
    assert len({one["steps"] for one in found}) == 1


def test_the_others_wait_for_the_first_and_end_with_it(found: list[dict[str, Any]]) -> None:
    assert [one["first"] for one in found] == ["made", None, None]
    error = "RunError: the first process stopped with an error, which it prints"
    division = "ZeroDivisionError: division by zero"
    assert [one["first failed"] for one in found] == [division, error, error]
    assert [one["first interrupted"] for one in found] == ["KeyboardInterrupt: "] * RANKS


def test_the_first_rank_speaks_for_all(found: list[dict[str, Any]]) -> None:
    assert [one["agreed"] for one in found] == ["said by 0"] * RANKS
    assert [one["together"] for one in found] == [[0, 1, 2]] * RANKS
