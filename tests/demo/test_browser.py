"""The demo as a person uses it, in a real browser: drop a picture, click a word, ask, point, read what went wrong.

The browser is the one of MMX_BROWSER, or one that this machine has; without it the journey is skipped.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_cases import draw
from demo_cases import free_port

import mmx
from mmx.data.scenes import generate_scene, render_scene
from mmx.demo.server import serve

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install playwright")

PLACES = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "google-chrome", "chromium")
BROWSER = os.environ.get("MMX_BROWSER") or next(filter(None, map(shutil.which, PLACES)), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser here; name one in MMX_BROWSER")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serve(mmx.load(), port=free_port()) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address) -> Iterator["playwright.Page"]:
    """The page, wide; it may ask this machine alone for anything."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(15_000)
    abroad: list[str] = []
    page.on("request", lambda request: abroad.append(request.url) if is_abroad(request.url) else None)
    page.goto(address)
    page.wait_for_selector("#picture input[type=file]", state="attached")
    yield page
    page.close()
    assert abroad == []


@pytest.fixture
def scene(tmp_path) -> Path:
    path = tmp_path / "scene.png"
    render_scene(generate_scene(3, 5), 160).save(path)
    return path


def is_abroad(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1", "data:", "blob:"))


def give(page, path: Path) -> None:
    page.set_input_files("#picture input[type=file]", str(path))


def shown(page, place: str, before: str | None = None) -> str:
    """The address of the picture in a place, once there is one, and another than before."""
    page.wait_for_function(
        "([place, before]) => { const img = document.querySelector(place + ' img'); return img && img.src != before }",
        arg=[place, before],
    )
    return page.locator(f"{place} img").get_attribute("src")


def captioned(page, path: Path) -> str:
    give(page, path)
    page.wait_for_selector("#words label")
    shown(page, "#heat")
    return page.locator("#caption textarea").input_value()


def test_drop_a_picture_read_its_caption_and_click_a_word(page, scene) -> None:
    caption = captioned(page, scene)
    words = page.locator("#words label").all_inner_texts()
    assert len(caption.split()) > 2 and [word.strip() for word in words] == caption.split()
    assert "Encoded once, in" in page.locator("#note").inner_text()
    heat = shown(page, "#heat")
    best = page.locator("#words input:checked").evaluate("one => Number(one.value)")
    other = 0 if best else 1
    page.locator("#words label").nth(other).click()
    assert shown(page, "#heat", heat) != heat
    playwright.expect(page.locator("#bits")).to_contain_text(f"{words[other].strip(' ,')}")
    playwright.expect(page.locator("#bits")).to_contain_text(": looking ")


def test_words_are_chosen_by_keyboard(page, scene) -> None:
    captioned(page, scene)
    heat = shown(page, "#heat")
    page.locator("#words input:not(:checked)").first.focus()
    page.keyboard.press("Space")
    assert shown(page, "#heat", heat) != heat


def test_ask_offer_answers_and_point_at_a_part(page, scene) -> None:
    captioned(page, scene)
    page.get_by_role("tab", name="Ask").click()
    page.get_by_label("Question").fill("how many shapes are there?")
    page.keyboard.press("Enter")
    chat = page.locator("#chat")
    playwright.expect(chat).to_contain_text("how many shapes are there?")
    playwright.expect(chat).to_contain_text(" ms)")
    page.get_by_role("button", name="Offered answers").click()
    page.get_by_label("Question").fill("is it red?")
    page.get_by_label("Answers, with commas between them").fill("yes, no")
    page.get_by_role("button", name="Rank them").click()
    playwright.expect(page.locator("#ranked")).to_contain_text("no")
    page.get_by_role("button", name="Ask about a part").click()
    before = shown(page, "#part")
    for down, across in ((0.3, 0.3), (0.6, 0.7)):
        part = page.locator("#part img")  # `click` waits until it stands still: what opened above it still moves
        box = part.bounding_box()
        part.click(position={"x": across * box["width"], "y": down * box["height"]})
        before = shown(page, "#part", before)
    sides = [float(page.get_by_label(name).input_value()) for name in ("Left", "Top", "Right", "Bottom")]
    assert sides == pytest.approx([0.3, 0.3, 0.7, 0.6], abs=0.02)
    page.get_by_label("Question").fill("what is this?")
    page.locator("#do-ask").click()
    playwright.expect(chat).to_contain_text("[0.")
    page.get_by_label("Left").fill("0.9")
    page.locator("#do-ask").click()
    playwright.expect(page.get_by_text("left before right").first).to_be_visible()


def test_look_inside_and_the_encoders(page, scene) -> None:
    caption = captioned(page, scene)
    page.get_by_role("tab", name="Look inside").click()
    playwright.expect(page.get_by_label("Looked into")).to_have_value(caption)
    page.locator("#word label").first.click()
    shown(page, "#inner-heat")
    assert page.locator("svg.marks, canvas.marks").count() == 2, "the bars"
    page.get_by_role("tab", name="Encoders").click()
    playwright.expect(page.locator("#encoders")).to_contain_text("mmx.encoders.image:ImageEncoder", timeout=40_000)


def test_a_bad_file_is_told_in_one_line(page, scene, tmp_path) -> None:
    captioned(page, scene)
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    give(page, bad)
    told = page.get_by_text("a picture of 10 bytes: no picture").first
    playwright.expect(told).to_be_visible()
    whole = page.locator("body").inner_text()
    assert "Traceback" not in whole and "mmx-demo" not in whole
    playwright.expect(page.locator("#words label")).to_have_count(0)
    playwright.expect(page.locator("#caption textarea")).to_have_value("")
    page.set_input_files("#picture input[type=file]", str(draw(tmp_path / "good.png", 2)))
    page.wait_for_selector("#words label")


@pytest.mark.parametrize("theme, width", [("light", 1280), ("dark", 400)])
def test_nothing_is_wider_than_the_window_and_every_control_has_a_name(page, address, scene, tmp_path, width, theme
                                                                       ) -> None:  # fmt: skip
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(f"{address}?__theme={theme}")
    page.wait_for_selector("#picture input[type=file]", state="attached")
    captioned(page, scene)
    for tab in ("Caption", "Ask", "Look inside", "Encoders"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(600)
        page.screenshot(path=tmp_path / f"{tab}-{theme}-{width}.png", full_page=True)
        inner, whole = page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
        assert whole <= inner == width, tab
        assert page.evaluate(NAMELESS) == [], tab


NAMELESS = """[...document.querySelectorAll('input, textarea, button, select')]
  .filter(one => one.checkVisibility() && one.type != 'file' && !one.closest('[aria-hidden=true]'))
  .filter(one => !(one.labels?.length || one.ariaLabel || one.title || one.innerText?.trim()
                   || one.querySelector('img[alt]') || document.getElementById(one.getAttribute('aria-labelledby'))))
  .map(one => one.outerHTML.slice(0, 160))"""
