"""Tables of memory in docs/tuning.md; `tables.py` writes them."""

from markdown_table import Row, distinct, table, where


def plan(rows: list[Row]) -> str:
    """One line per run, one column per phase: measured peak, and predicted over measured."""
    phases = ("sampling", "block pass", "layer fit", "block fine-tune", "PV-Tuning", "write")

    def cell(model: str, phase: str) -> str:
        for row in where(rows, model=model, phase=phase):
            return f"{row['ratio']:.2f} of {row['measured_bytes'] / 1e6:.0f} MB"
        return ""

    models = distinct(rows, "model")
    return table(
        ("predicted / measured", *phases), ([m, *(cell(m, p) for p in phases)] for m in models)
    )


def fits(rows: list[Row]) -> str:
    """One line per plan: what was chosen, and what it needs."""

    def chosen(row: Row) -> str:
        choices = row["choices"]
        words = {
            "original streamed": row["stream"],
            "original first": choices.get("teacher_first"),
            f"{choices.get('microbatch')} at once": choices.get("microbatch", 4) < 4,
            "activations twice": choices.get("recompute_activations"),
            "states on host": choices.get("states") == "host",
            "low_memory": choices.get("low_memory"),
        }
        return ", ".join(word for word, holds in words.items() if holds) or "nothing"

    def line(row: Row) -> list[str]:
        stage = "" if row["pv_hours"] else ", calibration alone"
        text = ", text given" if row["text_given"] else ""
        sizes = (f"{row[f'{part}_bytes'] / 1e9:.1f} GB" for part in ("device", "host", "disk"))
        return [
            f"{row['model']}{stage}{text}",
            f"{row['card']}, {row['card_gb']:g} GB; {row['host_gb']} GB",
            chosen(row),
            *sizes,
            f"{row['hours']:.1f}, {row['pv_hours']:.1f}",
        ]

    head = ("predictions", "card; host memory", "chosen", "device", "host", "disk")
    return table((*head, "hours in all, of PV-Tuning"), map(line, rows))


def least_machines(rows: list[Row]) -> str:
    """One line per model: the first of its plans, which is on the smallest card."""

    def line(row: Row) -> list[str]:
        note = "" if row["pv_hours"] else ", calibration alone, text given"
        return [
            row["model"] + note,
            f"{row['file_bytes'] / 1e9:.2f} GB",
            f"{row['card']}, {row['card_gb']:g} GB",
            f"{row['host_bytes'] / 1e9:.0f} GB",
            f"{row['disk_bytes'] / 1e9:.0f} GB",
            f"{row['hours']:.1f}",
        ]

    first = [
        next(row for row in rows if row["model"] == model) for model in distinct(rows, "model")
    ]
    head = ("predictions", "file", "card", "host memory", "disk", "hours")
    return table(head, map(line, first))


def quality(rows: list[Row]) -> str:
    """One line per stage of a recipe: what it cost, and what it left."""

    def line(row: Row) -> list[str]:
        kept = (f"{row[f'{text}_ppl']:.1f}" for text in ("wikitext2", "c4"))
        return [
            f"{row['scheme']}, {row['recipe']}, {row['stage']}",
            f"{row['cpu_seconds']:,}",
            f"{row['tokens']:,}",
            f"{row['heldout_kl']:.3f}",
            *kept,
        ]

    first = rows[0]
    originals = (f"{first[f'original_{text}_ppl']:.1f}" for text in ("wikitext2", "c4"))
    head = (first["model"], "CPU seconds", "tokens", "held-out KL", "WikiText-2", "C4")
    return table(head, [*map(line, rows), ["original", "", "", "", *originals]])
