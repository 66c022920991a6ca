"""Chat templates in folders as people and hubs leave them."""

import json
from pathlib import Path

import pytest

from pvrt.errors import CheckpointError
from pvrt_server.templates import chat_template


def test_a_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xe5 {{ messages }}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read as text"):
        chat_template(tmp_path)


@pytest.mark.parametrize(
    ("said", "template"),
    [
        ("{{ a }}", "{{ a }}"),
        ([{"name": "default", "template": "b"}, 5, {"name": ["x"]}], "b"),
        ([{"name": "default", "template": 5}], None),
        ([None], None),
        ({"a": 1}, None),
        (5, None),
    ],
)
def test_what_is_no_template_is_none(tmp_path: Path, said: object, template: str | None) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": said}))
    assert chat_template(tmp_path) == template


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "", "null"])
def test_files_that_are_no_json_object_have_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    assert chat_template(tmp_path) is None
