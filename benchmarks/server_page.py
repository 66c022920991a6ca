"""The screenshots in docs/server.md: `python benchmarks/server_page.py CHECKPOINT [QUESTION]`.

On a desktop and on a phone. The first answer is written here, for what the page can draw; the
second is the model's own, with its speed. Needs playwright and a Chromium of the system.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright
from server_conformance import served

DOCS = Path(__file__).resolve().parents[1] / "docs"
QUESTION = "Write a sentence about winter."
DEVICES: dict[str, dict[str, Any]] = {
    "server-page.png": {"viewport": {"width": 1180, "height": 900}},
    "server-page-phone.png": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    },
}
WRITTEN = """\
A layer in **additive codes** looks its products up instead of multiplying:

| form | bits per weight | codebooks |
|---|---|---|
| 1x16g8 | 2 | one of 65,536 vectors |
| 2x8g8 | 2 | two of 256 vectors |

```python
model = pvrt.load("quickstart")
```

Serve it with `pvrt serve quickstart`."""
TALK = [
    {"role": "user", "content": "How does a layer of 2 bits work?"},
    {"role": "assistant", "content": WRITTEN, "thought": "They want an example and a table."},
]


def picture(browser: Any, url: str, file: Path, device: dict[str, Any], question: str) -> None:
    """Ask, and take one picture."""
    tab = browser.new_page(color_scheme="light", **device)
    tab.set_default_timeout(120_000)
    tab.goto(url)
    tab.wait_for_selector("#card dd", state="attached")
    tab.evaluate("talk => sessionStorage.setItem('messages', talk)", json.dumps(TALK))
    tab.reload()
    tab.wait_for_selector("#card dd", state="attached")
    settings = {"temperature": "0", "limit": "80"}
    tab.evaluate(
        "all => Object.entries(all).forEach(([name, to]) => { $(name).value = to; })", settings
    )
    tab.fill("#prompt", question)
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".figures")
    tab.wait_for_timeout(2500)  # the next reading of memory
    tab.evaluate("document.querySelector('#side').scrollTop = 0")
    tab.screenshot(path=str(file))
    tab.close()
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


def main(checkpoint: Path, question: str = QUESTION) -> None:
    """Serve, and take the pictures."""
    chromium = shutil.which("chromium") or sys.exit("there is no chromium here")
    with served(checkpoint, "local", key=None) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, device in DEVICES.items():
            picture(browser, server.url, DOCS / name, device, question)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
