"""Calibration text in the forms in which the field publishes it; what cannot be used is told."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pvrt.errors import DataError
from pvrt_tune.data.documents import Found, documents
from pvrt_tune.data.rows import Conversation, document
from pvrt_tune.data.text import Windows, from_text
from tests.fixtures.toy import toy_tokenizer

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
ROWS: dict[str, tuple[dict[str, Any], Any]] = {
    "text": ({"id": 1, "text": "abc"}, "abc"),
    "messages": ({"messages": CHAT}, CHAT),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        CHAT,
    ),
    "completion": ({"prompt": "ab", "completion": "cd"}, "abcd"),
    "preference": ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": []}, CHAT),
    "alpaca": ({"instruction": "hi", "input": "", "output": "yo"}, CHAT),
}


def as_json(file: Path, rows: list[Any]) -> None:
    file.write_text(json.dumps(rows, indent=1))


def as_lines(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_gzip(file: Path, rows: list[Any]) -> None:
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def as_csv(file: Path, rows: list[Any]) -> None:
    with file.open("w", newline="") as table:
        writer = csv.DictWriter(table, sorted(set().union(*rows)))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})


def as_parquet(file: Path, rows: list[Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


FILES: dict[str, Callable[[Path, list[Any]], None]] = {
    "a.json": as_json,
    "lines.json": as_lines,
    "a.jsonl": as_lines,
    "a.jsonl.gz": as_gzip,
    "a.csv": as_csv,
    "a.parquet": as_parquet,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ROWS)
def test_every_form_is_read_from_every_format(tmp_path: Path, name: str, form: str) -> None:
    row, expected = ROWS[form]
    FILES[name](tmp_path / name, [row, row])
    found = Found()
    read = [d.messages if isinstance(d, Conversation) else d
            for d in documents(str(tmp_path / name), found)]  # fmt: skip
    assert read == [expected, expected]
    assert found.forms.total() == 2 and found.skipped == 0


def test_a_row_in_openai_form_is_what_templates_expect() -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    call = {"name": "weather", "arguments": '{"city": "Bern"}'}
    row = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "be"}], "name": None},
            {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": call}]},
            {"role": "tool", "tool_call_id": "1", "content": "dry", "tool_calls": None},
        ],
        "tools": json.dumps(tools),
    }
    _, made = document(row)
    assert isinstance(made, Conversation)
    function = {"name": "weather", "arguments": {"city": "Bern"}}
    assert made.tools == tools
    assert made.messages == [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": "1", "function": function}],
        },
        {"role": "tool", "content": "dry", "tool_call_id": "1"},
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "not an object"),
        ({"txet": 1}, 'none of "text", .* it has txet'),
        ({"messages": []}, "without messages"),
        ({"messages": "{"}, "Expecting"),
        ({"messages": [{"content": "x"}]}, "without a role"),
        ({"messages": [{"role": "user", "content": None}]}, "without text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "of type 'image'"),
        ({"messages": [{"role": "a", "tool_calls": [{"function": {}}]}]}, "a function's name"),
    ],
)
def test_a_row_of_no_form_is_refused(row: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        document(row)


def test_bad_rows_are_skipped_and_told(tmp_path: Path) -> None:
    good = json.dumps({"text": "abcdefgh" * 4})
    (tmp_path / "a.jsonl").write_text(f'{good}\n\n{{"txet": 1}}\n{{broken\n{good}\n')
    told: list[str] = []
    data = from_text(
        str(tmp_path / "a.jsonl"), toy_tokenizer(), Windows(2, 32, seed=0), notice=told.append
    )
    assert data.tokens.shape == (2, 32)
    assert len(told) == 1 and "2 text; 2 rows skipped, first: " in told[0]
    assert "a.jsonl:3 has none of" in told[0]


def test_a_conversation_that_the_template_refuses_is_skipped(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}T{% endif %}"
    )
    rows = [
        {"messages": [{"role": "user", "content": text}], "tools": [{"name": "f"}]}
        for text in ("bad", "abcdefg")
    ]
    as_lines(tmp_path / "a.jsonl", rows)
    told: list[str] = []
    spec = str(tmp_path / "a.jsonl")
    data = from_text(spec, tokenizer, Windows(1, 8, seed=0), notice=told.append)
    assert tokenizer.decode(data.tokens[0]) == "abcdefgT"
    assert "1 rows skipped" in told[0] and "refuses" in told[0]


def test_instructions_are_plain_text_without_a_template(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = None
    as_lines(tmp_path / "a.jsonl", [{"instruction": "do", "input": "it", "output": "done"}])
    data = from_text(str(tmp_path / "a.jsonl"), tokenizer, Windows(1, 12, seed=0))
    assert tokenizer.decode(data.tokens[0]) == "do\n\nit\n\ndone"


@pytest.mark.parametrize("odd", ["\u2028", "\u0085", "\x0c", "\x1e"])
def test_lines_end_at_line_feeds_alone(tmp_path: Path, odd: str) -> None:
    row = json.dumps({"text": f"a{odd}b"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n{row}\n".encode())
    assert list(documents(str(tmp_path / "a.jsonl"))) == [f"a{odd}b"] * 2


def test_the_mark_of_a_plain_text_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert list(documents(str(tmp_path / "a.txt"))) == ["abc"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16")),
        ("a.jsonl.gz", b"no gzip"),
        ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:20]),
        ("a.parquet", b"no parquet"),
        ("a.json", b"[]"),
        ("a.csv", b"id,body\n1,abc\n"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        list(documents(str(tmp_path / name)))
