"""`pvrt bench kernels --cpu`: every layer in every instruction set, and what serves first."""

import json
from pathlib import Path

import pytest

from pvrt.tools import bench_cpu_kernels
from pvrt_kernels.cpu import library
from pvrt_kernels.cpu.products import multiplies_bfloat16
from tests.fixtures.command_line import run
from tests.fixtures.toy import write_toy

needs_library = pytest.mark.skipif(library.library() is None, reason="the C library is not built")


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library", lambda: None)
    done = run("bench", "kernels", "--cpu")
    assert done.returncode == 2 and "install a C compiler" in done.stderr


@needs_library
def test_every_layer_is_timed_in_every_instruction_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_cpu_kernels, "_SECONDS", 0.0)
    monkeypatch.setattr(bench_cpu_kernels, "_COLD_BYTES", 1 << 17)  # a few copies
    write_toy(tmp_path, "llama")
    said: list[str] = []
    serves = library.instruction_set()
    records = bench_cpu_kernels.run(tmp_path, "2x8g8", said.append)
    assert library.instruction_set() == serves
    assert said[0].startswith(f"{serves} serves here")
    assert len(said) == 2 + len(records) / len(bench_cpu_kernels.TOKENS)
    for name in library.usable_instruction_sets():
        own = [record for record in records if record["isa"] == name]
        layers = {(record["out_features"], record["in_features"]) for record in own}
        assert layers == {(256, 128), (128, 128)}
        assert {record["tokens"] for record in own} == set(bench_cpu_kernels.TOKENS)
        with library.using(name):
            assert any(record["bfloat16"] for record in own) == multiplies_bfloat16()
    assert all(record["microseconds"] > 0 for record in records)


@needs_library
def test_the_command_prints_json_and_refuses_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_cpu_kernels, "_SECONDS", 0.0)
    monkeypatch.setattr(bench_cpu_kernels, "_COLD_BYTES", 1 << 17)
    assert run("bench", "kernels", "--cpu", "--tune").returncode == 2
    done = run("bench", "kernels", "--cpu", str(tmp_path / "nowhere"), "--json")
    assert done.returncode == 2 and "nowhere" in done.stderr
    write_toy(tmp_path / "toy", "llama")
    done = run("bench", "kernels", "--cpu", str(tmp_path / "toy"), "--json")
    assert {record["scheme"] for record in json.loads(done.stdout)} == {"2x8g8"}
