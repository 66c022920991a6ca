"""`pvrt chat`: turns, what begins anew, what ends an answer, and what is refused."""

import builtins
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.command_line import Done, run
from tests.fixtures.toy import write_toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    write_toy(folder)
    return folder


def told(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str, tokens: int = 8) -> Done:
    monkeypatch.setattr(sys, "stdin", StringIO("\n".join(lines)))
    return run("chat", str(folder), "--temperature", "0", "--max-tokens", str(tokens))


def test_a_conversation_goes_on_until_it_begins_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    from pvrt_server.engine.text import TextCodec

    encode = TextCodec.encode_chat

    def noted(self: TextCodec, messages: Any, **options: Any) -> list[int]:
        asked.append([message["role"] for message in messages])
        return encode(self, messages, **options)

    monkeypatch.setattr(TextCodec, "encode_chat", noted)
    done = told(folder, monkeypatch, "Who?", "", "Why?", "/new", "Who?", "/exit", "never")
    assert done.returncode == 0, done.stderr
    turns = ["user", "assistant", "user"]
    assert asked == [["user"], turns, ["user"]]
    parts = done.stdout.split("\n")
    assert done.stdout.endswith("\n") and parts[0] == parts[-2] != ""


def test_a_question_that_does_not_fit_costs_nothing_but_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = told(folder, monkeypatch, "Who?", "very " * 4000, "/new", "Who?")
    assert done.returncode == 0 and done.stderr.count("/new begins anew") == 1
    assert "this model's context" in done.stderr


def test_an_interrupted_answer_stays_in_the_conversation(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, show = [], builtins.print

    def interrupting(*values: Any, **options: Any) -> None:
        show(*values, **options)
        if options.get("end") == "":
            said.append(values[0])
            if len(said) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "print", interrupting)
    done = told(folder, monkeypatch, "Who?", "Why?", tokens=6)
    assert done.returncode == 0 and len(said) == 3 + 6


def test_a_model_without_a_template_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_toy(tmp_path)
    for file in tmp_path.glob("chat_template*"):
        file.unlink()
    config = tmp_path / "tokenizer_config.json"
    if "chat_template" in config.read_text():
        import json

        settings = json.loads(config.read_text())
        del settings["chat_template"]
        config.write_text(json.dumps(settings))
    done = told(tmp_path, monkeypatch, "Who?")
    assert done.returncode == 2 and "has no chat template" in done.stderr
