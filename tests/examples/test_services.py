"""The unit of systemd and the compose file: read as those read them who run them."""

import re
import shlex
import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

import pytest
import yaml

from tests.fixtures.commands import check_command

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
UNIT = EXAMPLES / "pvrt.service"


def unit() -> RawConfigParser:
    parser = RawConfigParser(strict=False, delimiters="=", comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(UNIT.read_text(encoding="utf-8"))
    return parser


def test_the_unit_starts_a_command_that_there_is() -> None:
    program, *words = shlex.split(unit()["Service"]["ExecStart"])
    assert Path(program).name == "pvrt"
    check_command(words)
    assert "127.0.0.1" in words, "others reach it through a proxy alone"


def test_the_unit_is_shut_in() -> None:
    service = unit()["Service"]
    assert service["DynamicUser"] == service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict" and service["ProtectHome"] == "yes"
    assert service["CapabilityBoundingSet"] == ""
    assert service["RestartPreventExitStatus"] == "2"  # what only a person can mend


def test_systemd_understands_every_line(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    here = UNIT.read_text(encoding="utf-8").replace(
        "/opt/pvrt/bin/pvrt", f"{sys.executable} -m pvrt"
    )
    (tmp_path / UNIT.name).write_text(here)
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert done.returncode == 0 and not said, done.stderr


def test_open_webui_reaches_the_server_of_the_comment() -> None:
    text = (EXAMPLES / "compose.yaml").read_text(encoding="utf-8")
    compose = yaml.safe_load(text)
    (service,) = compose["services"].values()
    settings = service["environment"]
    assert settings["OPENAI_API_BASE_URL"] == "http://host.docker.internal:8000/v1"
    assert "host.docker.internal:host-gateway" in service["extra_hosts"]
    assert re.match(r"\$\{PVRT_API_KEY:\?.+\}$", settings["OPENAI_API_KEY"])
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    used = {volume.partition(":")[0] for volume in service["volumes"]}
    assert used == compose["volumes"].keys()
    assert all(isinstance(value, str) for value in settings.values()), "compose takes no booleans"


def test_compose_accepts_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("there is no docker compose here")
    monkeypatch.setenv("PVRT_API_KEY", "key")
    command = [docker, "compose", "-f", str(EXAMPLES / "compose.yaml"), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
