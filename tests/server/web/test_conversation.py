"""What the page does with a conversation in a browser: Markdown, new chats, errors, reloads."""

import re
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


def test_reasoning_outlasts_a_reload_and_is_not_sent_back(tab: Any, opened: Opener) -> None:
    bodies = bodies_of(tab)
    with opened("Hm.\n</think>\n\nYes.", OPENS):
        ask(tab, "Hello")
        tab.wait_for_selector(".figures")
        tab.reload()
        tab.wait_for_selector("#card dd")
        assert tab.text_content(".thought div") == "Hm."
        ask(tab, "Again")
        tab.wait_for_selector(".figures")
    assert bodies[-1]["messages"][1] == {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize("secure", [True, False])
def test_an_answer_is_copied_as_it_was_written(tab: Any, opened: Opener, secure: bool) -> None:
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    with opened("**Hi**\n\n- *a*"):
        if not secure:  # as on a page that came over HTTP from another machine
            tab.evaluate("window.read = () => reader.readText(); reader = navigator.clipboard")
            tab.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        else:
            tab.evaluate("window.read = () => navigator.clipboard.readText()")
        ask(tab, "Hello")
        tab.wait_for_selector(".figures")
        tab.click("text=Copy")
        tab.wait_for_selector("#spoken:text-is('Copied')", state="attached")
        assert tab.evaluate("read()") == "**Hi**\n\n- *a*"


def test_an_answer_is_announced_once_and_whole(tab: Any, opened: Opener) -> None:
    with opened("one two three four"):
        assert tab.get_attribute("#log", "aria-live") == "off"
        tab.evaluate(
            "said = []; new MutationObserver(() => said.push(spoken.textContent))"
            ".observe(document.getElementById('spoken'), { childList: true })"
        )
        ask(tab, "Hello")
        tab.wait_for_selector(".figures")
        assert tab.evaluate("said") == ["one two three four"]


GROWING = """(text) => {
  const lexer = marked.lexer, grown = document.createElement("div");
  let read = 0, first = null;
  marked.lexer = (given, options) => { read += given.length; return lexer(given, options); };
  for (let end = 0; end < text.length; end += 40) {
    markdown(grown, text.slice(0, end), false);
    first ??= grown.firstChild;
  }
  markdown(grown, text);
  const kept = grown.firstChild === first, whole = document.createElement("div");
  marked.lexer = lexer;
  markdown(whole, text);
  return { read, kept, same: grown.innerHTML === whole.innerHTML, length: whole.childNodes.length };
}"""


def test_a_growing_answer_is_not_read_again_from_its_start(tab: Any, says: Server) -> None:
    """What is read is a multiple of the text's length, not of its square; and is drawn the same."""
    text = f"{MARKDOWN}\nSee [it].\n\n".replace("<img", "\r\n<img") * 40 + "[it]: https://a.b\n"
    tab.goto(says.url)
    tab.wait_for_selector("#card dd")
    found = tab.evaluate(GROWING, text)
    assert found["same"]
    assert found["length"] > 200
    assert found["read"] < 8 * len(text)
    plain = tab.evaluate(GROWING, text[: text.rindex("[it]")])
    assert plain["kept"]


METER = """() => {
  let now = 0;
  performance.now = () => now;
  const speed = meter(), path = () => document.getElementById("line").getAttribute("d");
  for (let i = 0; i < 3; i++) speed.token();  // the first come at once
  for (let i = 0; i < 1000; i++) { now += 90 + i % 20; speed.token(); }
  return { path: path(), figures: speed.end({ completion_tokens: 1003 }) };
}"""


def test_the_chart_shows_how_fast_tokens_come_after_the_first(tab: Any, says: Server) -> None:
    tab.goto(says.url)
    tab.wait_for_selector("#card dd")
    found = tab.evaluate(METER)
    heights = [float(point.split()[1]) for point in re.split("[ML]", found["path"])[1:]]
    assert 50 < len(heights) <= 101
    assert max(heights[20:]) < 15  # of 30, from above: a spike would press the others to the floor
    assert "10.1 tokens/s" in found["figures"]  # 1,000 tokens in 99.5 s, two at once


def test_a_whole_conversation_on_a_phone(phone: Any, says: Server) -> None:
    phone.goto(says.url)
    phone.wait_for_selector("#card dd", state="attached")
    width = "(() => { const pen = document.createElement('canvas').getContext('2d');"
    width += "pen.font = getComputedStyle(document.getElementById('prompt')).font;"
    width += "return pen.measureText(document.getElementById('prompt').placeholder).width; })()"
    assert phone.evaluate(width) < phone.evaluate("document.getElementById('prompt').clientWidth")
    wide = "| " + " | ".join(f"column {n}" for n in range(9)) + " |\n" + "|---" * 9 + "|\n"
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": wide + "x" * 200}]
    phone.evaluate("said => sessionStorage.setItem('messages', JSON.stringify(said))", said)
    phone.reload()
    phone.wait_for_selector("#card dd", state="attached")
    phone.fill("#prompt", "Hello")
    phone.tap("#send")
    phone.locator(".said.assistant .text", has_text="one two three 😀 four").wait_for()
    phone.wait_for_selector(".figures")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    assert phone.locator(".wide").evaluate("box => box.scrollWidth > box.clientWidth")
    phone.locator("text=Again").last.tap()
    phone.wait_for_selector(".figures")
    phone.tap("#panel")
    box = phone.locator("#side").bounding_box()
    assert box["width"] == 390
    assert box["height"] > 600
    assert "Max tokens" in phone.inner_text("#side")
    phone.tap("#panel")
    assert phone.locator("#ask").bounding_box()["y"] < 800
    phone.locator("text=Edit").last.tap()
    assert phone.input_value("#prompt") == "Hello"
    phone.tap("#fresh")
    assert phone.query_selector(".said") is None
