"""The page at /: what it may load, what it knows, and what it does in a browser."""

import re
import shutil
from pathlib import Path
from typing import Any

import httpx

from pvrt_server.opened import open_model
from pvrt_server.web.page import model_card
from tests.server.running import PATIENCE, Server, scripted_engine, serving


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_other_code(says: Server) -> None:
    page = says.get("/")
    assert page.headers["Content-Type"].startswith("text/html")
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "*" not in policy
    # The only addresses in it name the vocabulary of SVG and the home of the Markdown library.
    found = set(re.findall(r"https?://\w[\w.-]+", page.text))
    assert found == {"http://www.w3.org", "https://github.com"}
    assert "innerHTML" not in page.text
    assert not re.search(r"<[a-z]+[^>]*\s(on\w+|style)=", page.text)
    assert httpx.head(says.url, timeout=PATIENCE).status_code == 200
    assert says.post("/", {}).status_code in (404, 405)


def test_the_status_names_the_model_and_its_memory(says: Server, toy: Path) -> None:
    body = says.get("/pvrt/status").json()
    card = body["model"]
    assert (card["name"], card["scheme"], card["context"]) == (toy.name, "2x8g8", 512)
    assert card["architecture"] == "LlamaForCausalLM"
    assert card["chat"] is True
    assert card["file_bytes"] == (toy / "model.safetensors").stat().st_size
    assert body["memory"]["resident_bytes"] > 50_000_000  # torch alone takes more


def test_a_manifest_tells_where_a_model_comes_from_and_a_broken_one_nothing(toy: Path) -> None:
    copy = toy.parent / "with-manifest"
    shutil.copytree(toy, copy)
    (copy / "pvrt.json").write_text('{"base_model": {"name": "original", "sha256": "0"}}')
    assert model_card(open_model(copy))["base_model"] == "original"
    (copy / "pvrt.json").write_text("{")
    assert "base_model" not in model_card(open_model(copy))


def test_a_question_is_answered_as_a_stream_with_its_speed(tab: Any, says: Server) -> None:
    tab.goto(says.url)
    tab.wait_for_selector("#card dd")
    assert tab.title() == "toy"
    tab.keyboard.type("Hello")  # the field has the focus
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".figures")
    assert tab.inner_text(".said.user .text") == "Hello"
    assert tab.inner_text(".said.assistant .text") == "one two three 😀 four"
    figures = tab.inner_text(".figures")
    assert re.fullmatch(r"\d+ tokens, [\d.]+ tokens/s, first after [\d.]+ m?s", figures), figures
    assert tab.inner_text("#ttft") in figures
    assert tab.get_attribute("#line", "d").startswith("M0")
    assert re.fullmatch(r"\d+ MB|[\d.]+ GB", tab.inner_text("#memory"))
    assert "2x8g8" in tab.inner_text("#card")
    assert tab.evaluate("document.activeElement.id") == "prompt"


def test_a_conversation_is_sent_whole_with_the_settings(tab: Any, says: Server) -> None:
    tab.goto(says.url)
    tab.wait_for_selector("#card dd")
    tab.fill("#system", "Be brief.")
    tab.fill("#temperature", "0.5")
    bodies: list[Any] = []
    tab.on("request", lambda r: bodies.append(r.post_data_json) if r.method == "POST" else None)
    for number in (1, 2):
        tab.fill("#prompt", f"Question {number}")
        tab.click("#send")
        tab.locator(".figures").nth(number - 1).wait_for()
    assert [m["role"] for m in bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert bodies[1]["temperature"] == 0.5
    tab.click("#fresh")
    assert tab.query_selector(".said") is None


def test_escape_stops_an_answer_and_keeps_what_came(tab: Any, toy: Path) -> None:
    engine, model = scripted_engine(toy, "word " * 90)
    model.hold_after = 50
    with serving(engine) as server:
        tab.goto(server.url)
        tab.wait_for_selector("#card dd")
        tab.fill("#prompt", "Go on")
        tab.click("#send")
        tab.locator(".said.assistant .text", has_text="word").wait_for()
        tab.keyboard.press("Escape")
        tab.wait_for_selector(".figures")
        assert 0 < len(tab.inner_text(".said.assistant .text")) <= 51
        assert tab.is_visible("#send")
        model.gate.set()


def test_a_key_is_asked_for_and_an_error_is_shown(tab: Any, toy: Path) -> None:
    engine, _ = scripted_engine(toy, "a `b` and\n```python\nx = 1 < 2\n```\n<b>no mark-up</b>")
    with serving(engine, api_key="secret") as server:
        tab.goto(server.url)
        tab.wait_for_selector("#key")
        assert tab.evaluate("document.activeElement.id") == "key"
        tab.keyboard.type("secret")
        tab.keyboard.press("Tab")
        tab.wait_for_selector("#card dd")
        tab.fill("#temperature", "9")
        tab.fill("#prompt", "Hello")
        tab.keyboard.press("Enter")
        tab.wait_for_selector(".problem")
        assert "temperature" in tab.inner_text(".problem")
        tab.fill("#temperature", "")
        tab.fill("#prompt", "Hello")
        tab.keyboard.press("Enter")
        tab.wait_for_selector(".figures")
        # Code is drawn; mark-up that a model writes stays text.
        assert tab.inner_text(".text pre code") == "x = 1 < 2"
        assert "<b>no mark-up</b>" in tab.inner_text(".said.assistant .text")
        assert tab.query_selector(".said.assistant b") is None


def test_light_and_dark_follow_the_system_and_the_button(tab: Any, says: Server) -> None:
    tab.emulate_media(color_scheme="dark")
    tab.goto(says.url)
    theme = "document.documentElement.dataset.theme"
    assert tab.evaluate(theme) == "dark"
    tab.click("#theme")
    assert tab.evaluate(theme) == "light"
    other = tab.context.new_page()  # the theme is this browser's, not the tab's
    other.emulate_media(color_scheme="dark")
    other.goto(says.url)
    assert other.evaluate(theme) == "light"
