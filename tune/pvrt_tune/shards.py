"""A piece of a run whose tensors are cut over ranks: every rank writes and reads its own rows.

Part r of such a piece has the rows of rank r; tensors that every rank holds whole are in part 0. It
can be read by another number of ranks, which take their rows out of several parts.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from safetensors import safe_open

from pvrt.errors import RunError
from pvrt_tune import parallel
from pvrt_tune.parallel import Rows
from pvrt_tune.store import Store


def save(store: Store, name: str, tensors: Mapping[str, Rows], report: dict[str, Any]) -> None:
    """Store a piece, on every rank. Raises RunError on all of them when a disk refuses."""
    mine = {
        key: rows.local.detach().contiguous()
        for key, rows in tensors.items()
        if rows.height is not None or parallel.rank() == 0
    }
    hashes = parallel.together(lambda: store.write(name, mine, parallel.rank()))
    parallel.together(lambda: store.note(name, hashes, report))


def newest(store: Store, prefix: str) -> str | None:
    """The last piece by name that is whole on the disk, the same one on every rank."""

    def sound(name: str) -> bool:
        # Every rank reads a share of the parts.
        own = range(parallel.rank(), store.parts(name), parallel.world())
        return all(parallel.together(lambda: all(store.sound(name, part) for part in own)))

    names = parallel.agreed(store.names(prefix))
    return next((name for name in reversed(names) if sound(name)), None)


def fill(store: Store, name: str, tensors: Mapping[str, Rows]) -> None:
    """Fill this rank's rows of all tensors from a piece, in place.

    Raises RunError when the piece lacks one of them.
    """
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(store.file(name, part), "pt"))
            for part in range(store.parts(name))
        ]
        first, last = set(files[0].keys()), set(files[-1].keys())
        for key, rows in tensors.items():
            found = key if key in first else _old_name(key)
            if found not in first:
                raise RunError(
                    f"{store.file(name)} was saved by a version of pvrt that kept other things; "
                    "start again with --restart"
                )
            # Whole here may be cut there and the other way round: one process cuts nothing.
            _fill(rows, [file.get_slice(found) for file in (files if found in last else files[:1])])


def _fill(rows: Rows, parts: Sequence[Any]) -> None:
    """Take rows out of the parts of a tensor, which are safetensors' slices."""
    height, here = rows.height, slice(0, len(rows.local))
    if height is None:
        height = len(rows.local)
    else:
        here = parallel.rows_of(height)
    for index, part in enumerate(parts):
        there = parallel.rows_of(height, index, len(parts))
        start, stop = max(here.start, there.start), min(here.stop, there.stop)
        if start < stop:
            kept = part[start - there.start : stop - there.start]
            rows.local[start - here.start : stop - here.start].copy_(kept)


def _old_name(key: str) -> str:
    """What version 0.1 called a tensor: names of one level."""
    return key.partition("/")[2].replace("/", ".")
