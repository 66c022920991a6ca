"""Text, tasks and a small model that some benchmarks need, in the folder that PVRT_DATA names.

    PVRT_DATA=FOLDER python benchmarks/data.py      # fetches what FOLDER lacks, about 14 MB

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
TASKS = "tasks"  # a folder of TASK.jsonl


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


def documents(file: Path) -> list[str]:
    """The documents of a file of JSON lines."""
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


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


def question(row: dict[str, Any]) -> dict[str, Any]:
    """An item of ARC."""
    labels = row["choices"]["label"]
    gold = labels.index(row["answerKey"])
    query = f"Question: {row['question']}"
    return {"query": query, "choices": row["choices"]["text"], "gold": gold}


def goal(row: dict[str, Any]) -> dict[str, Any]:
    """An item of PIQA."""
    choices = [row["sol1"], row["sol2"]]
    return {"query": f"Question: {row['goal']}", "choices": choices, "gold": row["label"]}


def sentence(row: dict[str, Any]) -> dict[str, Any]:
    """An item of WinoGrande: either option in the gap, and what follows."""
    before, _, after = row["sentence"].partition("_")
    options = [f"{before}{row[name]}" for name in ("option1", "option2")]
    gold = int(row["answer"]) - 1
    return {"context_options": options, "continuation": after.strip(), "gold": gold}


def last_word(row: dict[str, Any]) -> dict[str, Any]:
    """An item of LAMBADA."""
    context, _, word = row["text"].rpartition(" ")
    return {"context": context, "continuation": word}


#: Task: dataset, its configuration and split, and how a row becomes an item.
ITEMS: dict[str, tuple[str, str | None, str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", question),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", question),
    "piqa": ("baber/piqa", None, "validation", goal),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", sentence),
    "lambada_openai": ("EleutherAI/lambada_openai", "default", "test", last_word),
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
    for task, (dataset, configuration, split, item) in ITEMS.items():
        file = folder / TASKS / f"{task}.jsonl"
        if not file.is_file():
            print(f"{task} from {dataset}", flush=True)
            items = map(item, load(dataset, configuration, split=split, streaming=True))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(each) + "\n" for each in items), encoding="utf-8")
    model = folder / STORIES260K
    if not model.exists():
        as_folder(Path(download("ggml-org/tiny-llamas", "stories260K.gguf")), model)


def as_folder(file: Path, folder: Path) -> Path:
    """The model of a GGUF file as safetensors; `folder` is there when it is whole."""
    from pvrt_tune.data.source_model import load_source

    source, partial = load_source(str(file)), folder.with_name(f"{folder.name}.partial")
    source.dense(source.model.dtype).save_pretrained(partial)
    source.tokenizer.save_pretrained(partial)
    return partial.rename(folder)


def main() -> None:
    """Fetch into the folder of the variable."""
    if VARIABLE not in os.environ:
        sys.exit(f"set {VARIABLE} to the folder that the files go to")
    from datasets import load_dataset
    from huggingface_hub import hf_hub_download

    fetch(Path(os.environ[VARIABLE]), load_dataset, hf_hub_download)


if __name__ == "__main__":
    main()
