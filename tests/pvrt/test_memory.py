"""Free memory where a container has a limit."""

from pathlib import Path

import pytest

from pvrt import memory

STATUS = "anon 1000\nfile 7000\nactive_file 2000\ninactive_file 4000\nshmem 1000\n"


@pytest.mark.parametrize(("limit", "free"), [("10000", 10000 - 9000 + 6000), ("max", None)])
def test_pages_of_files_are_free(
    monkeypatch: pytest.MonkeyPatch, limit: str, free: int | None
) -> None:
    """Of 9000 bytes in use 6000 are what was read of files."""
    files = {"memory.max": limit, "memory.current": "9000\n", "memory.stat": STATUS}
    monkeypatch.setattr(Path, "read_text", lambda self, *_: files[self.name])
    whole = 1 << 40
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("", (), {"available": whole}))
    assert memory.free_host_bytes() == (whole if free is None else free)


def test_a_machine_without_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path, *_: object) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert memory.free_host_bytes() > 0
