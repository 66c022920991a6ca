"""Plans are for machines that tests describe: their disk has room, whatever this one has."""

import psutil  # type: ignore[import-untyped]
import pytest


@pytest.fixture(autouse=True)
def _roomy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = psutil.disk_usage("/")._replace(total=4 << 40, free=4 << 40)
    monkeypatch.setattr(psutil, "disk_usage", lambda path: usage)
