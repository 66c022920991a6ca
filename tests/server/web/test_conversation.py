"""What the page does with a conversation in a browser: Markdown, new chats, errors, reloads."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.server.api.test_reasoning import OPENS
from tests.server.running import Server, scripted_engine, serving

MARKDOWN = """# Head

Some **bold**, *em*, `code` and [a link](https://example.org) or [none](javascript:alert(1)).

1. one
2. two
   - inner

> said

| a | b |
|---|---|
| 1 | 2 |

```python
x = 1 < 2
```

<img src=x onerror=alert(1)>
"""
Opener = Callable[..., AbstractContextManager[Any]]


@pytest.fixture
def opened(tab: Any, toy: Path) -> Opener:
    """Opens the page on a server of a script; yields the script's model."""

    @contextmanager
    def open_page(script: str, template: str | None = None, **options: Any) -> Iterator[Any]:
        engine, model = scripted_engine(toy, script)
        if template is not None:
            engine.codec.tokenizer.chat_template = template
        with serving(engine, **options) as server:
            tab.goto(server.url)
            tab.wait_for_selector("#card dd" if not options else "#key")
            yield model
            model.gate.set()
            tab.goto("about:blank")  # it asks for figures as long as it is open

    return open_page


def ask(tab: Any, text: str) -> None:
    tab.fill("#prompt", text)
    tab.keyboard.press("Enter")


def bodies_of(tab: Any) -> list[Any]:
    found: list[Any] = []
    tab.on("request", lambda r: found.append(r.post_data_json) if r.method == "POST" else None)
    return found


def test_markdown_is_drawn_and_html_is_not(tab: Any, opened: Opener) -> None:
    with opened(MARKDOWN):
        ask(tab, "Hello")
        tab.wait_for_selector(".figures")
        answer = ".said.assistant .text"
        for selector, text in {
            "h1": "Head",
            "strong": "bold",
            "em": "em",
            "p > code": "code",
            "ol > li > ul > li": "inner",
            "blockquote": "said",
            "td >> nth=1": "2",
            "pre code": "x = 1 < 2",
        }.items():
            assert tab.inner_text(f"{answer} {selector}").strip() == text, selector
        assert tab.eval_on_selector_all(f"{answer} a", "all => all.map(a => a.href)") == [
            "https://example.org/"
        ]
        assert "<img src=x" in tab.inner_text(answer)
        assert tab.query_selector(f"{answer} img") is None
        ground = "getComputedStyle(document.querySelector('.text p > code')).backgroundColor"
        assert tab.evaluate(ground) != "rgba(0, 0, 0, 0)"


def test_a_new_chat_knows_nothing_of_the_answer_that_was_under_way(
    tab: Any,
    opened: Opener,
) -> None:
    bodies = bodies_of(tab)
    with opened("word " * 20) as model:
        model.hold_after = 10
        ask(tab, "Old")
        tab.locator(".said.assistant .text", has_text="word").wait_for()
        tab.click("#fresh")
        model.hold_after = None
        model.gate.set()
        ask(tab, "New")
        tab.wait_for_selector(".figures")
        assert [m["content"] for m in bodies[-1]["messages"]] == ["New"]
        assert tab.locator(".said").count() == 2
        ask(tab, "More")
        tab.locator(".figures").nth(1).wait_for()
    assert [m["role"] for m in bodies[-1]["messages"]] == ["user", "assistant", "user"]


def test_a_reload_keeps_the_conversation(tab: Any, opened: Opener) -> None:
    bodies = bodies_of(tab)
    with opened("**Hi**"):
        ask(tab, "Hello")
        tab.wait_for_selector(".figures")
        tab.reload()
        tab.wait_for_selector("#card dd")
        assert tab.inner_text(".said.assistant .text strong") == "Hi"
        ask(tab, "Again")
        tab.wait_for_selector(".figures")
    assert len(bodies[-1]["messages"]) == 3


def test_a_wrong_key_is_told_and_a_right_one_closes_the_panel(
    tab: Any,
    opened: Opener,
) -> None:
    with opened("Hi", api_key="secret"):
        assert not tab.is_visible("#wrong")
        tab.fill("#key", "guess")
        tab.keyboard.press("Tab")
        tab.wait_for_selector("#wrong")
        tab.fill("#key", "secret")
        tab.keyboard.press("Tab")
        tab.wait_for_selector("#card dd")
        assert not tab.is_visible("#locked")


def test_a_message_that_failed_goes_back_to_its_field(tab: Any, opened: Opener) -> None:
    with opened("Hi"):
        tab.fill("#temperature", "9")
        ask(tab, "Precious")
        tab.wait_for_selector(".problem:not(#wrong)")
        assert tab.input_value("#prompt") == "Precious"
        tab.fill("#temperature", "")
        ask(tab, "Precious")
        tab.wait_for_selector(".figures")
        assert tab.locator(".said.user").count() == 1


def test_a_cut_answer_says_so_and_can_be_asked_again_or_edited(
    tab: Any,
    opened: Opener,
) -> None:
    bodies = bodies_of(tab)
    with opened("one two three"):
        tab.fill("#limit", "3")
        ask(tab, "Count")
        tab.wait_for_selector(".figures")
        assert "cut off" in tab.inner_text(".figures")
        tab.fill("#limit", "")
        tab.click("text=Again")
        tab.locator(".said.assistant .text", has_text="three").wait_for()
        tab.wait_for_selector(".figures")
        assert "cut off" not in tab.inner_text(".figures")
        assert [m["content"] for m in bodies[-1]["messages"]] == ["Count"]
        tab.click("text=Edit")
        assert tab.input_value("#prompt") == "Count"
        assert tab.query_selector(".said") is None


def test_what_is_selected_stays_selected_while_text_comes(
    tab: Any,
    opened: Opener,
) -> None:
    with opened("first\n\n" + "word " * 30) as model:
        model.hold_after = 30
        ask(tab, "Hello")
        tab.locator(".said.assistant p", has_text="word").wait_for()
        tab.evaluate("getSelection().selectAllChildren(document.querySelector('.assistant p'))")
        model.hold_after = None
        model.gate.set()
        tab.wait_for_selector(".figures")
        assert tab.evaluate("getSelection().toString()") == "first"


def test_reasoning_is_folded_away(tab: Any, opened: Opener) -> None:
    with opened("Hm.\n</think>\n\nYes.", OPENS):
        ask(tab, "Hello")
        tab.wait_for_selector(".figures")
        assert tab.inner_text(".said.assistant .text") == "Yes."
        assert not tab.is_visible(".thought div")
        tab.click(".thought summary")
        assert tab.inner_text(".thought div") == "Hm."


def test_on_a_phone_the_details_fill_the_width(tab: Any, says: Server) -> None:
    tab.set_viewport_size({"width": 390, "height": 800})
    tab.goto(says.url)
    tab.wait_for_selector("#card dd", state="attached")
    ask(tab, "Hello")
    tab.wait_for_selector(".figures")
    tab.click("#panel")
    box = tab.locator("#side").bounding_box()
    assert box["width"] == 390
    assert box["height"] > 600
    tab.click("#panel")
    assert tab.locator("#ask").bounding_box()["y"] < 800
