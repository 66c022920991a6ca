"""The C sources under sanitizers: a program of their own runs every kernel from several threads.

`make sanitize` runs all tests of the kernels over libraries that are built so.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.fixtures.instruction_sets import compiled

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizers_are_silent(tmp_path: Path, sanitizer: str) -> None:
    driver = compiled(
        tmp_path / "driver",
        "-g",
        "-O1",
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
        str(HERE / "tsan_driver.c"),
        "-lpthread",
    )
    # Threads keep their scratch until they end, as those of OpenMP never do.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([str(driver)], env=environment, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run under this kernel's address layout")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data race" not in done.stderr
