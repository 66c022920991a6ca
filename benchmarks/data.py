"""Text and a small model that some benchmarks need, in the folder that PVRT_DATA names.

    PVRT_DATA=FOLDER python benchmarks/data.py      # fetches what FOLDER lacks, about 10 MB

It takes pip install 'pvrt[data]' and a way to the Hugging Face hub. WikiText-2 is the whole test
and validation split and the first megabyte of train. Of the large sets it is the first documents,
so figures from other documents of the same sets differ a little.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

VARIABLE = "PVRT_DATA"
TEST, VALIDATION = "wikitext2/wiki.test.raw", "wikitext2/wiki.valid.raw"
TRAIN = "wikitext2/wiki.train.first1MB.noblank.txt"
WIKIPEDIA, WEB, C4 = "text/wikipedia.jsonl", "text/openwebtext.jsonl", "text/c4.jsonl"
TINYSTORIES, STORIES260K = "text/tinystories.txt", "models/stories260K-hf"
TASKS = "tasks"


def find(name: str) -> Path | None:
    """A file or model of the folder; None where the variable is not set or it is not there."""
    folder = os.environ.get(VARIABLE)
    file = Path(folder) / name if folder else None
    return file if file is not None and file.exists() else None


def need(name: str) -> Path:
    """As `find`; ends the script with a sentence where it is not there."""
    file = find(name)
    if file is None:
        print(f"{name} is needed: {VARIABLE}=FOLDER python benchmarks/data.py", file=sys.stderr)
        sys.exit(2)
    return file


def raw(rows: Iterable[str]) -> str:
    """WikiText as one file: blank rows are empty lines."""
    return "".join(row or "\n" for row in rows)


def first_megabyte(rows: Iterable[str]) -> str:
    """Rows that are not blank, up to 10^6 bytes."""
    text = "".join(row for row in rows if row.strip())
    return text.encode()[: 10**6].decode(errors="ignore")


def lines(count: int) -> Callable[[Iterable[str]], str]:
    """The first documents as JSON lines."""
    return lambda rows: "".join(json.dumps({"text": row}) + "\n" for row in islice(rows, count))


def stories(rows: Iterable[str]) -> str:
    """The first stories, a blank line between two."""
    return "\n\n".join(islice(rows, 320))


#: File: dataset, its configuration and split, and how its rows become the file.
SOURCES: dict[str, tuple[str, str | None, str, Callable[[Iterable[str]], str]]] = {
    TEST: ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", raw),
    VALIDATION: ("Salesforce/wikitext", "wikitext-2-raw-v1", "validation", raw),
    TRAIN: ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", first_megabyte),
    WIKIPEDIA: ("wikimedia/wikipedia", "20231101.en", "train", lines(1000)),
    WEB: ("Skylion007/openwebtext", None, "train", lines(500)),
    C4: ("allenai/c4", "en", "validation", lines(500)),
    TINYSTORIES: ("roneneldan/TinyStories", None, "validation", stories),
}


def fetch(folder: Path, load: Callable[..., Any], download: Callable[..., str]) -> None:
    """Write what the folder lacks, by `datasets.load_dataset` and `hf_hub_download`."""
    for name, (dataset, configuration, split, written) in SOURCES.items():
        file = folder / name
        if not file.is_file():
            print(f"{name} from {dataset}", flush=True)
            rows = load(dataset, configuration, split=split, streaming=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(written(row["text"] for row in rows), encoding="utf-8")
    model = folder / STORIES260K
    if not model.exists():
        as_folder(Path(download("ggml-org/tiny-llamas", "stories260K.gguf")), model)


def as_folder(file: Path, folder: Path) -> Path:
    """The model of a GGUF file as safetensors."""
    from pvrt_tune.data.source_model import load_source

    source = load_source(str(file))
    source.dense(source.model.dtype).save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    """Fetch into the folder of the variable."""
    if VARIABLE not in os.environ:
        sys.exit(f"set {VARIABLE} to the folder that the files go to")
    from datasets import load_dataset
    from huggingface_hub import hf_hub_download

    fetch(Path(os.environ[VARIABLE]), load_dataset, hf_hub_download)


if __name__ == "__main__":
    main()
