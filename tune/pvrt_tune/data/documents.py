"""The documents of a calibration text: files in the field's usual formats, folders, datasets.

A row that cannot be used is skipped and counted; a text without any usable row is an error.
"""

import csv
import gzip
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from pvrt.errors import DataError
from pvrt.tools.perplexity import read_utf8
from pvrt.versions import install
from pvrt_tune.data.rows import FORMS, Document, document

_PLAIN = (".txt", ".md", ".rst", ".raw", ".text")
_TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_SUFFIXES = {*_PLAIN, *_TABLES, ".gz"}


@dataclass
class Found:
    """What was read of a text: rows by their form, and how many were skipped, with the first."""

    forms: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    first: str = ""

    def skip(self, where: str, reason: object) -> None:
        """Count a row that cannot be used."""
        self.skipped += 1
        self.first = self.first or f"{where} {reason}"

    def line(self, spec: str) -> str:
        """What the user should know of it."""
        found = ", ".join(f"{count} {form}" for form, count in self.forms.items())
        skipped = f"; {self.skipped} rows skipped, first: {self.first}" if self.skipped else ""
        return f"{spec}: {found}{skipped}"


def check_named(spec: str) -> None:
    """Raise DataError for a name that can only be a file's, and none is there."""
    path = Path(spec).expanduser()
    if not is_local(spec) and not spec.startswith("hf:") and path.suffix in _SUFFIXES:
        raise DataError(f"{spec} does not exist; give a text file, a folder or a dataset name")


def documents(spec: str, found: Found | None = None) -> Iterator[Document]:
    """Documents of a calibration spec in a fixed order (see `from_text`), noted in `found`.

    Raises DataError for files that cannot be read, and where no row has a form that is known.
    """
    found = Found() if found is None else found
    path = Path(spec).expanduser()
    if is_local(spec):
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
            if not files:
                known = ", ".join(sorted(_SUFFIXES))
                raise DataError(f"{path} holds no text files ({known})")
        for file in files:
            yield from _file_documents(file, found)
    else:
        check_named(spec)
        yield from _from_rows(_dataset_rows(spec.removeprefix("hf:")), f"dataset {spec}", found)
    if not found.forms:
        raise DataError(f"{found.first or spec + ' is empty'}; no row of {spec} can be used")


def is_local(spec: str) -> bool:
    """Whether a spec names something on this machine."""
    return not spec.startswith("hf:") and Path(spec).expanduser().exists()


def _file_documents(file: Path, found: Found) -> Iterator[Document]:
    kind = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
    try:
        if kind == ".parquet":
            yield from _from_rows(_parquet_rows(file), str(file), found)
        elif kind not in _TABLES:
            text = _open(file).read() if file.suffix == ".gz" else read_utf8(file)
            found.forms["texts"] += 1
            yield text
        else:
            with _open(file) as lines:
                yield from _from_rows(_rows(lines, kind), str(file), found)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}") from error


def _open(file: Path) -> TextIO:
    """A text file, compressed or not, without the mark that some begin with. Lines end at \\n."""
    opener: Any = gzip.open if file.suffix == ".gz" else open
    opened: TextIO = opener(file, "rt", encoding="utf-8-sig", newline="\n")
    return opened


def _rows(lines: TextIO, kind: str) -> Iterator[Any]:
    """Rows of a table, or what stands in place of one that cannot be parsed."""
    if kind in (".csv", ".tsv"):
        csv.field_size_limit(sys.maxsize >> 33 or 1 << 30)
        yield from csv.DictReader(lines, delimiter="," if kind == ".csv" else "\t")
        return
    if kind == ".json":
        text = lines.read()
        try:
            whole = json.loads(text)
        except ValueError:  # lines of JSON, which many call .json
            lines = iter(text.split("\n"))  # type: ignore[assignment]
        else:
            yield from whole if isinstance(whole, list) else [whole]
            return
    for line in lines:
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                yield error
        else:
            yield None


def _parquet_rows(file: Path) -> Iterator[Any]:
    try:
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(f"{file}: reading it needs {install('data')}") from error
    try:
        for batch in ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # of which those of pyarrow are
        raise DataError(f"{file} is damaged or no parquet file: {error}") from error


def _from_rows(rows: Iterable[Any], where: str, found: Found) -> Iterator[Document]:
    """The documents of rows; an empty line (None) is no row."""
    for number, row in zip(itertools.count(1), rows, strict=False):
        if row is None:
            continue
        try:
            if isinstance(row, ValueError):
                raise ValueError(f"is not JSON ({row})")
            form, made = document(row)
        except ValueError as error:
            found.skip(f"{where}:{number}", error)
            continue
        found.forms[form] += 1
        yield made


def _dataset_rows(name: str) -> Iterator[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"{name} is no file or folder here, and reading it as a Hugging Face dataset needs "
            f"{install('data')}"
        ) from error
    repository, _, split = name.partition(":")
    try:
        for number, row in enumerate(
            load_dataset(repository, split=split or "train", streaming=True)
        ):
            if number == 0:
                _known(name, row)
            yield row
    except DataError:
        raise
    except Exception as error:  # the library raises dozens of types, all about one cause
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"cannot read {name} as a file, folder or dataset: {reason}") from error


def _known(name: str, row: Any) -> None:
    """Raise DataError for the columns of a dataset, which may have no end, if none is known."""
    names = set(FORMS.split('"')) | {"content", "conversation", "response"}
    if not names & row.keys():
        raise DataError(f"dataset {name} has no column of {FORMS}; it has {sorted(row)}")
