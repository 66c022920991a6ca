"""The screenshot in docs/server.md: `python benchmarks/server_page.py CHECKPOINT [QUESTION]`.

Needs playwright and a Chromium of the system.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright
from server_conformance import served

OUT = Path(__file__).resolve().parents[1] / "docs" / "server-page.png"
QUESTION = "What is a river?"


def main(checkpoint: Path, question: str = QUESTION) -> None:
    """Serve, ask, and take the picture."""
    chromium = shutil.which("chromium") or sys.exit("there is no chromium here")
    with served(checkpoint, "local", key=None) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1180, "height": 800}, color_scheme="light")
        tab.set_default_timeout(120_000)
        tab.goto(server.url)
        tab.wait_for_selector("#card dd")
        tab.fill("#temperature", "0")
        tab.fill("#limit", "160")
        tab.fill("#prompt", question)
        tab.keyboard.press("Enter")
        tab.wait_for_selector(".figures")
        tab.wait_for_timeout(2500)  # the next reading of memory
        tab.evaluate("document.querySelector('#side').scrollTop = 0")
        tab.screenshot(path=str(OUT))
        browser.close()
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
