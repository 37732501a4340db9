"""The playground in a browser, against a double of the server."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from mock_server import PLAYGROUND, WORDS, Double, running
from starlette.testclient import TestClient

from tokenary.core.errors import RecipeError
from tokenary.core.recipe import Recipe
from tokenary.core.registry import cards
from tokenary.serve import answers
from tokenary.serve.app import create_app
from tokenary.serve.settings import Settings

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("TOKENARY_CHROMIUM", "/usr/bin/chromium")
pytestmark = pytest.mark.skipif(shutil.which(CHROMIUM) is None, reason=f"no browser: {CHROMIUM} is not there")

SIDES = "#mode=completion&sides=2&max=24&prompt=Once+upon+a+time"
DONE = '#stop[aria-disabled="true"]'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture
def double() -> Double:
    return Double()


class Visit:
    """A page of its own, and what it asked for and complained of."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        options = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options}
        self.context, self.url = browser.new_context(**options), url
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.complaints.append(said.text))

    def open(self, hash: str = "", ready: bool = True) -> Any:
        self.page.goto(self.url + hash)
        if ready:
            self.page.wait_for_selector("#examples button", state="attached")
        return self.page

    def send(self) -> None:
        self.page.click("#send")
        self.page.wait_for_selector(DONE)


@pytest.fixture
def visit(browser: Any, double: Double) -> Iterator[Visit]:
    with running(double) as url:
        one = Visit(browser, url)
        yield one
        one.context.close()
        origin = urlsplit(url)[:2]
        assert {urlsplit(asked)[:2] for asked in one.asked} == {origin}, "a request left the origin"
        # What the server refuses, the browser reports too.
        own = [words for words in one.complaints if not words.startswith("Failed to load resource")]
        assert own == []


def until(page: Any, holds: str) -> None:
    """Wait for an expression; the page's own rules forbid it to evaluate texts, so it is asked from here."""
    for _ in range(200):
        if page.evaluate(holds):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never came: {holds}")


def figures(page: Any, at: int = 0) -> dict[str, str]:
    cells = page.locator(".answer").nth(at).locator("[data-figure]").all()
    return {cell.get_attribute("data-figure"): cell.locator("dd").inner_text() for cell in cells}


def kinds(page: Any, at: int = 0) -> list[str]:
    tiles = page.locator(".answer").nth(at).locator(":scope > .tokens .tile").all()
    return [tile.get_attribute("class").split()[1] for tile in tiles]


def test_it_loads_in_silence(visit: Visit) -> None:
    page = visit.open()
    assert visit.complaints == []
    assert page.input_value("#model") == "smollm2"
    assert page.locator("#recipe-a-draft option").all_inner_texts() == ["none", "token-recycling", "prompt-lookup"]
    assert page.locator("#examples button").count() == 4


def test_no_file_holds_inline_code_or_an_outside_address() -> None:
    for path in PLAYGROUND.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "eval(" not in text, path
        assert "style=" not in text and "onclick=" not in text and "<style" not in text, path
        assert "https://" not in text and "http://" not in text.replace("http://www.w3.org/2000/svg", ""), path
        if path.suffix == ".js":
            assert text.count("\n") <= 250 and max(map(len, text.splitlines())) <= 120, path


@pytest.mark.parametrize("key", [None, "a-key-of-sixteen-signs"])
def test_the_server_gives_every_file_to_anyone(key: str | None) -> None:
    client = TestClient(create_app(Settings(api_key=key)), base_url="http://127.0.0.1:8000")
    kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for path in PLAYGROUND.iterdir():
        answer = client.get("/" if path.name == "index.html" else f"/{path.name}")
        assert (answer.status_code, answer.content) == (200, path.read_bytes()), path.name
        assert answer.headers["content-type"].startswith(kinds[path.suffix])
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")


def test_tokens_come_as_tiles_by_origin(visit: Visit, double: Double) -> None:
    page = visit.open("#a=token-recycling&max=12&prompt=Hello+there")
    visit.send()
    assert kinds(page)[:4] == ["target", "drafted", "drafted", "drafted"]
    assert double.asked[0]["tokenary"] == {"recipe": "token-recycling", "watch": True}
    assert double.asked[0]["messages"] == [{"role": "user", "content": "Hello there"}]
    shown = figures(page)
    assert shown["tokens"] == "12" and shown["kv"] == "691 kB"
    assert (shown["passes"], shown["rate"]) == ("5", "2.20")
    # Not by colour alone.
    style = "(tile) => getComputedStyle(tile).borderBottomStyle"
    assert page.eval_on_selector("#turns .tile.drafted", style) == "solid"
    assert page.eval_on_selector("#turns .tile.target", style) == "dotted"
    assert page.locator("#turns .tile.drafted").first.get_attribute("aria-label") == "␣river, drafted, accepted"
    assert page.locator(".strip span").count() == 6


def test_a_chat_goes_on_and_is_sent_whole(visit: Visit, double: Double) -> None:
    page = visit.open("#max=3&system=Be+brief.&prompt=Hello")
    visit.send()
    assert page.input_value("#prompt") == ""
    page.fill("#prompt", "And then?")
    visit.send()
    roles = [(one["role"], one["content"]) for one in double.asked[1]["messages"]]
    said = " ".join(WORDS[:3])
    assert roles == [("system", "Be brief."), ("user", "Hello"), ("assistant", said), ("user", "And then?")]


def test_a_turn_is_sent_again_as_the_page_is_set_now(visit: Visit, double: Double) -> None:
    page = visit.open("#max=3&prompt=Hello")
    visit.send()
    page.fill("#prompt", "And then?")
    visit.send()
    page.fill("#prompt", "half written")
    page.fill("#recipe-a", "token-recycling")
    page.get_by_role("button", name="Send again").first.click()
    page.wait_for_selector(DONE)
    assert [one["content"] for one in double.asked[2]["messages"]] == ["Hello"]
    assert double.asked[2]["tokenary"]["recipe"] == "token-recycling"
    assert page.locator(".turn").count() == 1
    assert page.input_value("#prompt") == "half written"


def test_what_the_cache_lost_is_faded(visit: Visit) -> None:
    page = visit.open("#a=keyformer:keep%3D50%25&max=30&prompt=one+two+three+four+five+six+seven+eight")
    visit.send()
    assert page.locator("summary", has_text="9 tokens, ").is_visible()
    held = page.eval_on_selector_all(
        "#turns .tile", "(tiles) => tiles.map((tile) => tile.style.getPropertyValue('--held'))"
    )
    assert {"0", "0.25", "0.6"} <= set(held)
    assert page.locator("#turns .tile.gone").count() > 5
    assert page.locator(".tile.prompt.gone").count() > 0


def test_without_watching_there_is_text_alone(visit: Visit, double: Double) -> None:
    page = visit.open(SIDES + "&watch=0&b=keyformer")
    visit.send()
    assert double.asked[0]["tokenary"]["watch"] is False
    assert kinds(page) == []
    assert page.locator(".plain").first.is_visible()
    assert figures(page)["tokens"] == "24" and figures(page)["passes"] == "23"
    assert page.locator(".verdict").inner_text().startswith("The texts differ.")


@pytest.mark.parametrize("by", ["button", "escape"])
def test_stop_ends_the_stream_on_the_server(visit: Visit, double: Double, by: str) -> None:
    double.pause = 0.05
    page = visit.open("#max=5000&prompt=Hello")
    page.click("#send")
    page.wait_for_selector("#turns .tile.target")
    if by == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    page.wait_for_selector(DONE)
    assert page.locator(".ending").inner_text() == "stopped"
    assert 0 < int(figures(page)["tokens"]) < 5000
    page.wait_for_timeout(300)
    assert double.broken_off == 1
    visit.page.fill("#prompt", "Again")
    page.fill("[name=max]", "3")
    visit.send()
    assert page.locator(".ending").nth(1).inner_text() == "reached max tokens"


def test_two_sides_that_agree(visit: Visit, double: Double) -> None:
    page = visit.open(SIDES + "&b=token-recycling")
    visit.send()
    assert [
        asked["tokenary"].get("recipe", "") for asked in sorted(double.asked, key=lambda asked: len(asked["tokenary"]))
    ] == ["", "token-recycling"]
    assert page.locator(".verdict").inner_text().startswith("Equal, token for token: 24 tokens.")
    assert set(kinds(page, 0)) == {"target"} and "drafted" in kinds(page, 1)
    assert float(figures(page, 1)["rate"]) > float(figures(page, 0)["rate"])


def test_two_sides_that_part(visit: Visit) -> None:
    page = visit.open(SIDES + "&b=keyformer")
    visit.send()
    assert page.locator(".verdict").inner_text().startswith("They part at token 13: A has “␣bend”, B “␣dunes”.")
    assert page.locator(".tile.differs").all_inner_texts() == ["\u00a0bend", "\u00a0dunes"]


def test_one_side_may_fail_alone(visit: Visit) -> None:
    page = visit.open(SIDES + "&b=hisa+%2B+keyformer")
    visit.send()
    assert page.locator(".ending").all_inner_texts() == ["reached max tokens", "refused with 422"]
    assert page.locator(".verdict").inner_text() == ""


def test_composer_and_text_stay_in_step(visit: Visit) -> None:
    page = visit.open()
    page.select_option("#recipe-a-draft", "token-recycling")
    page.select_option("#recipe-a-keep", "keyformer")
    assert page.input_value("#recipe-a") == "keyformer + token-recycling"
    page.locator(".recipe[data-side=a] summary", has_text="Options").first.click()
    page.fill("[data-side=a] [data-option=nodes]", "24")
    assert page.input_value("#recipe-a") == "keyformer + token-recycling:nodes=24"
    page.fill("#recipe-a", "token-recycling:nodes=8,tree=published")
    assert page.input_value("[data-side=a] [data-option=nodes]") == "8"
    assert page.input_value("[data-side=a] [data-option=tree]") == "published"
    assert page.input_value("#recipe-a-keep") == ""
    assert "Lossless" in page.locator("#recipe-a-note").inner_text()
    page.fill("#recipe-a", "token-recycing")
    assert page.locator("#recipe-a-note").inner_text() == "there is no method “token-recycing”"
    assert page.locator("#recipe-a-draft").is_disabled()
    page.fill("#recipe-a", "")
    assert page.locator("#recipe-a-draft").is_enabled() and page.input_value("#recipe-a-draft") == ""


def test_a_refused_recipe_gives_the_reason_before_and_after_sending(visit: Visit) -> None:
    page = visit.open("#prompt=Hello")
    page.select_option("#recipe-a-keep", "keyformer")
    assert page.locator("#recipe-a-read option").nth(1).inner_text() == "hisa (not with keyformer)"
    page.select_option("#recipe-a-read", "hisa")
    words = page.locator("#recipe-a-note").inner_text()
    assert words.startswith("hisa and keyformer do not compose: its index holds every token")
    assert page.get_attribute("#recipe-a", "aria-invalid") == "true"
    visit.send()
    assert page.locator(".problem").inner_text() == words
    assert page.locator(".ending").inner_text() == "refused with 422"


RECIPES = [
    "",
    "plain",
    "keyformer",
    " token-recycling : nodes=24 , k=4+keyformer:keep=50%",
    "keyformer:keep=50%+token-recycling:nodes=24",
    "awrs:regex=[a-z]+ [0-9]{2,3}",
    "awrs:regex=a+plain",
    "awrs:regex=a,b",
    'awrs:json={"a": 1, "b": [1, 2]},particles=4',
    "keyformer:recent=0.1,keep=25% + aded",
    "token-recycling + aded",
    "hisa + keyformer",
    "zipcache + recent",
    "group-think + token-recycling",
]


def test_recipes_are_read_as_the_package_reads_them(visit: Visit) -> None:
    visit.open()
    read = """async ([texts, cards]) => {
        const { parse, format, refusal } = await import("./recipe.js");
        const known = new Map(cards.map((card) => [card.slug, card]));
        return texts.map((text) => {
            const steps = parse(text, known);
            return refusal(steps.map((step) => known.get(step.slug))) ?? (format(steps) || "plain");
        });
    }"""
    for text, read_there in zip(
        RECIPES, visit.page.evaluate(read, [RECIPES, [card.to_dict() for card in cards()]]), strict=True
    ):
        try:
            expected = str(Recipe.parse(text))
        except RecipeError as error:
            expected = str(error)
        assert read_there == expected, text


def test_unreadable_recipes_are_refused_by_both(visit: Visit) -> None:
    visit.open()
    read = """async ([text, cards]) => {
        const { parse, RecipeError } = await import("./recipe.js");
        try { parse(text, new Map(cards.map((card) => [card.slug, card]))); return "read"; }
        catch (error) { return error instanceof RecipeError ? "refused" : String(error); }
    }"""
    all_cards = [card.to_dict() for card in cards()]
    for text in ("keyformer:keep", "keyformer:keep=1,keep=2", "nothing", "keyformer:=3"):
        assert visit.page.evaluate(read, [text, all_cards]) == "refused", text
        with pytest.raises(Exception, match=r"."):
            Recipe.parse(text)


def test_streams_are_read_however_they_are_cut(visit: Visit) -> None:
    visit.open()
    read = """async (cut) => {
        const { events } = await import("./api.js");
        const sent = [': hello', '', 'data: {"a":"é😀"}', '', ''].join("\\r\\n")
            + ["event: x", "data: 1", "data:2", "", ": ping", "", "data: [DONE]", "", ""].join("\\n");
        const bytes = new TextEncoder().encode(sent);
        const body = new ReadableStream({ start(control) {
            for (let at = 0; at < bytes.length; at += cut) control.enqueue(bytes.slice(at, at + cut));
            control.close();
        } });
        const all = [];
        for await (const data of events(body)) all.push(data);
        return all;
    }"""
    for cut in (1, 2, 3, 5, 1000):
        assert visit.page.evaluate(read, cut) == ['{"a":"é😀"}', "1\n2", "[DONE]"], cut


def test_an_api_key_is_asked_for_and_kept_in_the_tab(browser: Any) -> None:
    double = Double(key="a-key-of-sixteen-signs")
    with running(double) as url:
        visit = Visit(browser, url)
        page = visit.open("#max=4&prompt=Hello", ready=False)
        page.wait_for_selector("#problem:not(:empty)")
        assert page.locator("#problem").inner_text() == "This server asks for an API key. (Give the API key above.)"
        page.fill("#key", "a-key-of-sixteen-signs")
        page.press("#key", "Tab")
        page.wait_for_selector("#examples button")
        visit.send()
        assert page.locator("#problem").inner_text() == ""
        page.fill("[name=seed]", "7")
        until(page, "location.hash.includes('seed=7')")
        assert "signs" not in page.url
        assert page.evaluate("localStorage.length") == 0 and page.evaluate("document.cookie") == ""
        page.reload()
        page.wait_for_selector("#examples button", state="attached")
        assert page.input_value("#key") == "a-key-of-sixteen-signs"
        visit.context.close()


def test_a_server_that_is_gone(visit: Visit) -> None:
    page = visit.open("#prompt=Hello")
    visit.context.set_offline(True)
    visit.send()
    assert page.locator(".problem").inner_text() == "The server cannot be reached."
    assert page.locator(".ending").inner_text() == "failed"
    visit.context.set_offline(False)


def test_an_error_in_the_stream_is_shown_in_its_words(visit: Visit) -> None:
    page = visit.open("#prompt=Hello")
    failed = {
        "error": {"message": "the worker died", "type": "server_error", "param": None, "code": "service_unavailable"}
    }
    begun = {"choices": [{"index": 0, "delta": {"content": "Hi"}}]}
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in (begun, failed))
    page.route("**/chat/completions", lambda route: route.fulfill(body=text, content_type="text/event-stream"))
    visit.send()
    assert page.locator(".problem").inner_text() == "the worker died"
    assert page.locator(".plain").text_content() == "Hi"


def test_the_set_up_is_in_the_address(visit: Visit) -> None:
    page = visit.open()
    page.check("[name=sides]")
    page.locator(".switch label", has_text="Completion").click()
    page.fill("#recipe-a", "keyformer:keep=50% + token-recycling")
    page.fill("#recipe-b", "prompt-lookup")
    page.fill("[name=temperature]", "0.7")
    page.fill("#prompt", "Two & two = four\n100% sure #1 é")
    page.uncheck("[name=watch]")
    until(page, "location.hash.includes('watch=0') && location.hash.includes('sure')")
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#share")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url
    other = visit.context.new_page()
    other.goto(link)
    other.wait_for_selector("#recipe-b-draft", state="attached")
    read = "async () => (await import('./state.js')).read()"
    assert other.evaluate(read) == page.evaluate(read)
    assert other.input_value("#recipe-b-draft") == "prompt-lookup"
    assert other.evaluate(read)["prompt"] == "Two & two = four\n100% sure #1 é"
    other.evaluate("location.hash = '#a=hisa'")
    until(other, "document.getElementById('recipe-a-read').value === 'hisa'")
    assert other.evaluate(read)["sides"] == "1"
    other.close()


def test_addresses_cannot_do_harm(visit: Visit) -> None:
    evil = "%3Cimg+src%3Dx+onerror%3D%22window.hit%3D1%22%3E"
    page = visit.open(f"#a={evil}&b={evil}&system={evil}&schema={evil}&mode={evil}&view=none&key=stolen&prompt={evil}")
    assert page.input_value("#key") == ""
    page.locator(".switch label", has_text="Chat").click()
    page.fill("#schema", "")
    visit.send()
    assert page.locator(".user").text_content() == '<img src=x onerror="window.hit=1">'
    assert page.locator("img").count() == 0
    assert page.evaluate("window.hit") is None


def test_text_view_and_copy(visit: Visit) -> None:
    page = visit.open("#a=token-recycling&max=20&prompt=Hello")
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.send()
    whole = " ".join(WORDS[:18]) + "".join(f" {word}" for word in (WORDS * 2)[18:20])
    page.locator(".switch label", has_text="Text").click()
    assert page.locator(".plain").is_visible() and page.locator("#turns .tile.target").first.is_hidden()
    assert page.locator(".plain").text_content() == whole
    page.get_by_role("button", name="Copy text A").click()
    until(page, "document.querySelector('.answer header button').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == whole


@pytest.mark.parametrize("mode", ["chat", "completion"])
def test_stop_texts_and_log_probabilities(visit: Visit, double: Double, mode: str) -> None:
    page = visit.open(f"#mode={mode}&max=4&prompt=Hi")
    page.locator("#stops-fold summary").click()
    page.fill("#stops", "END\n\\n\\n\n")
    page.fill('[name="logprobs"]', "2")
    visit.send()
    assert double.asked[0]["stop"] == ["END", "\n\n"]
    told = ("logprobs", "top_logprobs")
    assert [double.asked[0].get(name) for name in told] == ([True, 2] if mode == "chat" else [2, None])
    page.locator(".answer > .tokens .tile").nth(1).click()
    words = page.locator(".answer .inspect").inner_text()
    assert words.endswith("log-probability -0.69 (50.0%) · likeliest “␣river” 50.0%, “other1” 25.0%"), words
    page.fill('[name="logprobs"]', "0")
    page.fill("#stops", "")
    page.fill("#prompt", "Hi")
    visit.send()
    assert "stop" not in double.asked[1] and double.asked[1]["logprobs"] == (True if mode == "chat" else 0)
    page.locator(".answer > .tokens").last.locator(".tile").nth(1).click()
    assert page.locator(".answer .inspect").last.inner_text().endswith("log-probability -0.69 (50.0%)")
    page.fill('[name="logprobs"]', "")
    page.fill("#prompt", "Hi")
    visit.send()
    assert "logprobs" not in double.asked[2]


def test_schema_and_sampling_are_sent(visit: Visit, double: Double) -> None:
    page = visit.open("#max=5&temperature=0.8&top_p=0.9&top_k=40&seed=3&prompt=Hello")
    page.locator("#schema-fold summary").click()
    page.fill("#schema", '{"type": ')
    assert page.locator("#schema-note").inner_text().startswith("The schema is not JSON")
    page.click("#send")
    assert page.locator("#problem").inner_text().startswith("The schema is not JSON")
    assert double.asked == []
    page.fill("#schema", '{"type": "object"}')
    visit.send()
    (asked,) = double.asked
    assert {name: asked[name] for name in ("max_tokens", "temperature", "top_p", "top_k", "seed")} == {
        "max_tokens": 5,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 3,
    }
    assert asked["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_the_keyboard_is_enough(visit: Visit) -> None:
    page = visit.open("#a=token-recycling&max=12")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    until(page, "document.activeElement.id === 'prompt'")
    page.keyboard.type("Hello there")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(DONE)
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "A: tokens of the text"
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    inspected = page.locator(".inspect").inner_text()
    assert inspected.startswith("“␣and” · id ") and "token 11 · " in inspected
    chosen = page.evaluate(
        "document.getElementById(document.activeElement.getAttribute('aria-activedescendant')).ariaSelected"
    )
    assert chosen == "true"
    order = []
    page.focus(".skip")
    for _ in range(40):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.name || ''"))
    assert (
        order.index("model")
        < order.index("recipe-a")
        < order.index("temperature")
        < order.index("prompt")
        < order.index("send")
    )
    assert {"stop", "clear"} <= set(order)


def test_what_a_screen_reader_hears(visit: Visit) -> None:
    page = visit.open("#max=4&prompt=Hello")
    said = "const box = document.getElementById('spoken'); window.said = [];"
    page.evaluate(
        said + "new MutationObserver(() => window.said.push(box.textContent)).observe(box, {childList: true})"
    )
    visit.send()
    until(page, "window.said.length > 0")
    assert page.evaluate("window.said") == ["Text A reached max tokens, 4 tokens in 3 passes: The river bends twice"]


CONTROLS = {
    "button",
    "textbox",
    "combobox",
    "checkbox",
    "radio",
    "spinbutton",
    "listbox",
    "option",
    "link",
    "searchbox",
}


def test_every_control_has_a_name(visit: Visit) -> None:
    page = visit.open(SIDES + "&a=token-recycling&b=keyformer")
    page.evaluate("document.querySelectorAll('details').forEach((fold) => (fold.open = true))")
    visit.send()
    tree = visit.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    controls = [node for node in tree if not node["ignored"] and node["role"]["value"] in CONTROLS]
    assert len(controls) > 60
    assert [node for node in controls if not node.get("name", {}).get("value", "").strip()] == []
    ids = page.eval_on_selector_all("[id]", "(nodes) => nodes.map((node) => node.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate("document.documentElement.lang") == "en" and page.title()


CONTRAST = Path(__file__).with_name("contrast.js")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser: Any, double: Double, scheme: str) -> None:
    with running(double) as url:
        visit = Visit(browser, url, color_scheme=scheme)
        page = visit.open(SIDES + "&a=keyformer+%2B+token-recycling&b=hisa+%2B+keyformer")
        faint = page.evaluate(CONTRAST.read_text())
        page.evaluate("document.querySelectorAll('details').forEach((fold) => (fold.open = true))")
        visit.send()
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        faint += page.evaluate(CONTRAST.read_text())
        visit.context.close()
    assert faint == []
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]


@pytest.mark.parametrize("width", [320, 390, 768, 1000])
def test_narrow_screens_do_not_scroll_sideways(browser: Any, double: Double, width: int) -> None:
    with running(double) as url:
        visit = Visit(browser, url, viewport={"width": width, "height": 800})
        page = visit.open(SIDES + "&a=keyformer:keep%3D50%25+%2B+token-recycling:nodes%3D24&b=token-recycling")
        visit.send()
        page.evaluate("document.querySelectorAll('details').forEach((fold) => (fold.open = true))")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        visit.context.close()


@pytest.mark.parametrize(("motion", "moves"), [("reduce", "none"), ("no-preference", "come")])
def test_motion_is_a_choice(browser: Any, double: Double, motion: str, moves: str) -> None:
    with running(double) as url:
        visit = Visit(browser, url, reduced_motion=motion)
        page = visit.open("#max=3&prompt=Hello")
        visit.send()
        assert page.eval_on_selector("#turns .tile", "(tile) => getComputedStyle(tile).animationName") == moves
        visit.context.close()


@pytest.mark.parametrize("chat", [True, False])
def test_the_double_answers_in_the_server_s_shapes(double: Double, chat: bool) -> None:
    body = {
        "prompt": "Hello",
        "max_tokens": 9,
        "seed": 1,
        "tokenary": {"recipe": "keyformer + prompt-lookup", "watch": True},
    }

    async def collect() -> list[str]:
        return [line async for line in double.chunks(body, chat)]

    with ThreadPoolExecutor(1) as other:  # playwright keeps a loop in this thread
        *lines, last = other.submit(lambda: asyncio.run(collect())).result()
    assert last == "data: [DONE]\n\n"
    shape = answers.ChatChunk if chat else answers.Completion
    for line in lines:
        sent = json.loads(line.removeprefix("data: "))
        assert json.loads(shape.model_validate(sent).json_text()) == sent  # nothing missing, nothing unknown
