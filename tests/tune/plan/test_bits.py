"""Plans of runs that share bits out: the file's size is said from config.json alone."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pvrt.cli import app
from tests.fixtures.shapes import LLAMA_8B, config_only


def planned(path: Path, *options: str) -> tuple[int, str]:
    """(exit code, output) of a plan for a large model on a roomy card."""
    config_only(path, LLAMA_8B)
    roomy = [
        "--host-memory",
        "1000",
        "--device-memory",
        "1000",
        "--device",
        "cuda",
        "--out",
        str(path),
    ]
    result = CliRunner().invoke(app, ["plan", str(path), "--no-pv", *roomy, *options])
    return result.exit_code, result.output + (str(result.exception) if result.exit_code else "")


@pytest.mark.parametrize("bits", ["1.3", "2.5", "4"])
def test_the_file_has_the_bits_that_were_asked_for(tmp_path: Path, bits: str) -> None:
    code, output = planned(tmp_path, "--bits", bits, "--json")
    assert code == 0, output
    plan = json.loads(output)
    assert 0.999 * float(bits) < plan["result"]["bits_per_weight_file"] <= float(bits)
    weights = 8_030_261_248
    assert plan["result"]["file_bytes"] <= float(bits) * weights / 8
    names = [phase["name"] for phase in plan["phases"]]
    assert names.index("measuring bits") == names.index("block pass") - 1
    assert all(phase["seconds"] > 0 for phase in plan["phases"] if phase["name"] != "write")
    assert f"{float(bits):g} bits" in plan["scheme"]


def test_bits_out_of_reach_and_a_scheme_beside_bits_are_one_sentence(tmp_path: Path) -> None:
    assert "--bits 1 is out of reach" in planned(tmp_path, "--bits", "1")[1]
    assert "give either" in planned(tmp_path, "--bits", "2", "--scheme", "2x8g8")[1]
    assert "--bits is 9.0" in planned(tmp_path, "--bits", "9")[1]
