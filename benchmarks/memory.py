"""Peak memory of this process, by phase."""

import threading
import time
from collections import defaultdict
from pathlib import Path


def sizes() -> dict[str, int]:
    """Bytes now: "anonymous" is what the process has allocated (RssAnon + RssShmem); "all" also
    counts mapped files, which the system takes back when memory is short.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    anonymous = 1024 * (int(found["RssAnon"]) + int(found["RssShmem"]))
    return {"anonymous": anonymous, "all": anonymous + 1024 * int(found["RssFile"])}


class Watch(threading.Thread):
    """Looks every 3 ms; `peak[phase]` is the largest of each size while `phase` was set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.phase = "start"
        self.peak: dict[str, dict[str, int]] = defaultdict(dict)

    def run(self) -> None:
        """Look until the process ends."""
        while True:
            self.look()
            time.sleep(0.003)

    def look(self) -> None:
        """Look now."""
        phase, now = self.phase, sizes()
        if phase == self.phase:  # else the phase changed meanwhile: whose memory was it?
            peak = self.peak[phase]
            peak.update({name: max(size, peak.get(name, 0)) for name, size in now.items()})
