"""What is printed to paste is pasted."""

import json
import shutil
import subprocess

import pytest

from pvrt_server.snippets import snippets
from tests.server.running import Server


def part(text: str, begin: str, end: str) -> str:
    return text.partition(begin)[2].partition("\n")[2].partition(end)[0]


@pytest.mark.parametrize("chat", [True, False])
def test_the_openai_snippet_runs(
    says: Server, chat: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    code = part(snippets(says.url, "toy", keyed=False, chat=chat), "# Python", "\n# Open WebUI")
    exec(compile(code, "snippet", "exec"), {})
    assert "one two" in capsys.readouterr().out


@pytest.mark.parametrize("chat", [True, False])
def test_the_curl_snippet_runs(says: Server, chat: bool) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    command = part(snippets(says.url, "toy", keyed=False, chat=chat), "# curl", "\n# Python")
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert "one two" in json.dumps(json.loads(answer.stdout)["choices"])


def test_a_key_is_asked_for_and_never_shown() -> None:
    text = snippets("http://127.0.0.1:1", "it's", keyed=True, chat=True)
    assert text.count("YOUR_KEY") == 3
    assert "Authorization: Bearer YOUR_KEY" in text
    assert '"it\'s"' in text
