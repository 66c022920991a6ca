"""The options of a server: one sentence for each value that cannot be, and one way to say it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import ValidationError

from pvrt import cli
from pvrt.errors import ServeError
from pvrt_server.options import ServeOptions


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"port": 65536}, "--port is 65536; it must be at most 65535"),
        ({"port": -1}, "--port is -1; it must be at least 0"),
        ({"port": "http"}, "--port is 'http'; input should be a valid integer"),
        ({"max_model_len": 0}, "--max-model-len is 0; it must be at least 1"),
        ({"max_num_seqs": 0}, "--max-num-seqs is 0; it must be at least 1"),
        ({"max_num_queued_reqs": -2}, "--max-num-queued-reqs is -2; it must be at least 1"),
        ({"cache_bytes": -1}, "--cache-bytes is -1; it must be at least 0"),
        ({"sse_keep_alive_seconds": 0}, "--sse-keep-alive-seconds is 0; it must be more than 0"),
        ({"dtype": "int4"}, "--dtype is 'int4'; choose auto, float32, bfloat16 or float16"),
        ({"engine": "tgi"}, "--engine is 'tgi'; choose auto, vllm or local"),
        ({"log_level": "loud"}, "--log-level is 'loud'; choose debug, info, warning, error or"),
        ({"max_sequences": 3}, "there is no option --max-sequences"),
        (
            {"max_model_length": 3},
            "there is no option --max-model-length; did you mean --max-",
        ),
        ({"api_key": "sch\u00f6n"}, "the API key must be one or more printable ASCII characters"),
        ({"extra": ("--port=1",)}, "--port is pvrt's own: give it before the --"),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ServeError) as caught:
        ServeOptions(**given)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
    with pytest.raises(ServeError):
        ServeOptions().changed(**given)


def test_options_do_not_change_and_hide_the_key() -> None:
    options = ServeOptions(api_key="secret", port=9)
    with pytest.raises(ValidationError, match="frozen"):
        options.port = 8
    assert "secret" not in repr(options)
    assert (options.changed(port=8).port, options.port) == (8, 9)


def test_the_address_is_one_that_this_machine_can_reach() -> None:
    for host, url in {"0.0.0.0": "127.0.0.1", "::": "[::1]", "fe80::1": "[fe80::1]"}.items():
        assert ServeOptions(host=host).url == f"http://{url}:8000"


def test_every_flag_of_the_command_is_an_option_with_the_same_default() -> None:
    command = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    flags = {each.name: each.default for each in command.params if each.name != "path"}
    options = ServeOptions()
    assert flags == {name: getattr(options, name) for name in flags}


def test_the_command_ends_with_2_and_the_sentence_before_anything_is_imported(toy: Path) -> None:
    code = (
        "import json, sys; from pvrt.cli import main\n"
        "try: main()\n"
        "finally: print(json.dumps('torch' in sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "serve", str(toy), "--port", "70000"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "--port is 70000; it must be at most 65535" in run.stderr
    assert "Traceback" not in run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) is False


def test_origins_are_a_list_with_commas() -> None:
    given = ServeOptions(allowed_origins="https://a.org, http://localhost:3000")
    assert given.origins == ("https://a.org", "http://localhost:3000")
    assert ServeOptions().origins == ()
    with pytest.raises(ServeError, match="without a path"):
        ServeOptions(allowed_origins="https://a.org/page")
