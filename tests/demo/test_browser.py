"""The demo in a browser: upload an image, select a word, ask, select a region, read an error.

The browser is that of MMX_BROWSER, or one that is installed; without one the tests are skipped.
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

PATHS = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "google-chrome", "chromium")
BROWSER = os.environ.get("MMX_BROWSER") or next(filter(None, map(shutil.which, PATHS)), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no browser was found; name one in MMX_BROWSER"),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serve(mmx.load(), port=free_port()) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address) -> Iterator["playwright.Page"]:
    """The page on a wide screen. Requests to other hosts fail the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(15_000)
    foreign: list[str] = []
    page.on("request", lambda request: foreign.append(request.url) if is_foreign(request.url) else None)
    page.goto(address)
    page.wait_for_selector("#image input[type=file]", state="attached")
    yield page
    page.close()
    assert foreign == []


@pytest.fixture
def scene(tmp_path) -> Path:
    path = tmp_path / "scene.png"
    render_scene(generate_scene(3, 5), 160).save(path)
    return path


def is_foreign(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1", "data:", "blob:"))


def choose(page, path: Path) -> None:
    page.set_input_files("#image input[type=file]", str(path))


def image_url(page, selector: str, before: str | None = None) -> str:
    """The URL of the image in an element, once there is one and it differs from `before`."""
    page.wait_for_function(
        """([selector, before]) => {
          const img = document.querySelector(selector + ' img');
          return img && img.src != before;
        }""",
        arg=[selector, before],
    )
    return page.locator(f"{selector} img").get_attribute("src")


def upload_and_caption(page, path: Path) -> str:
    choose(page, path)
    page.wait_for_selector("#caption-words label")
    image_url(page, "#caption-heatmap")
    return page.locator("#caption textarea").input_value()


def test_upload_an_image_and_select_a_word_of_its_caption(page, scene) -> None:
    caption = upload_and_caption(page, scene)
    words = page.locator("#caption-words label").all_inner_texts()
    assert len(caption.split()) > 2 and [word.strip() for word in words] == caption.split()
    assert "Encoded once in" in page.locator("#note").inner_text()
    heatmap = image_url(page, "#caption-heatmap")
    best = page.locator("#caption-words input:checked").evaluate("one => Number(one.value)")
    other = 0 if best else 1
    page.locator("#caption-words label").nth(other).click()
    assert image_url(page, "#caption-heatmap", heatmap) != heatmap
    playwright.expect(page.locator("#caption-gain")).to_contain_text(f"{words[other].strip(' ,')}")
    playwright.expect(page.locator("#caption-gain")).to_contain_text(": information gain ")


def test_words_are_selected_by_keyboard(page, scene) -> None:
    upload_and_caption(page, scene)
    heatmap = image_url(page, "#caption-heatmap")
    page.locator("#caption-words input:not(:checked)").first.focus()
    page.keyboard.press("Space")
    assert image_url(page, "#caption-heatmap", heatmap) != heatmap


def test_ask_rank_candidates_and_select_a_region(page, scene) -> None:
    upload_and_caption(page, scene)
    page.get_by_role("tab", name="Ask").click()
    page.get_by_label("Question").fill("how many shapes are there?")
    page.keyboard.press("Enter")
    chat = page.locator("#chat")
    playwright.expect(chat).to_contain_text("how many shapes are there?")
    playwright.expect(chat).to_contain_text(" ms)")
    page.get_by_role("button", name="Rank candidate answers").click()
    page.get_by_label("Question").fill("is it red?")
    page.get_by_label("Candidate answers, separated by commas").fill("yes, no")
    page.get_by_role("button", name="Rank", exact=True).click()
    playwright.expect(page.locator("#ranked")).to_contain_text("no")
    page.get_by_role("button", name="Ask about a region").click()
    before = image_url(page, "#region")
    for y, x in ((0.3, 0.3), (0.6, 0.7)):
        region = page.locator("#region img")  # `click` waits until it stands still
        box = region.bounding_box()
        region.click(position={"x": x * box["width"], "y": y * box["height"]})
        before = image_url(page, "#region", before)
    playwright.expect(page.get_by_label("Left")).not_to_have_value("0")  # the fields follow the image
    sides = [float(page.get_by_label(name).input_value()) for name in ("Left", "Top", "Right", "Bottom")]
    assert sides == pytest.approx([0.3, 0.3, 0.7, 0.6], abs=0.02)
    page.get_by_label("Question").fill("what is this?")
    page.locator("#ask-button").click()
    playwright.expect(chat).to_contain_text("[0.")
    page.get_by_label("Left").fill("0.9")
    page.locator("#ask-button").click()
    playwright.expect(page.get_by_text("left before right").first).to_be_visible()


def test_attention_maps_and_encoders(page, scene) -> None:
    caption = upload_and_caption(page, scene)
    page.get_by_role("tab", name="Attention maps").click()
    playwright.expect(page.locator("#map-text textarea")).to_have_value(caption)
    page.locator("#map-words label").first.click()
    image_url(page, "#map-heatmap")
    assert page.locator("svg.marks, canvas.marks").count() == 2, "the bar plots"
    page.get_by_role("tab", name="Encoders").click()
    playwright.expect(page.locator("#encoders")).to_contain_text("mmx.encoders.image:ImageEncoder", timeout=40_000)


def test_a_damaged_file_is_one_line(page, scene, tmp_path) -> None:
    upload_and_caption(page, scene)
    bad = tmp_path / "bad.png"
    bad.write_text("not an image")
    choose(page, bad)
    message = page.get_by_text("image data of 12 bytes").first
    playwright.expect(message).to_be_visible()
    text = page.locator("body").inner_text()
    assert "Traceback" not in text and "mmx-demo" not in text
    playwright.expect(page.locator("#caption-words label")).to_have_count(0)
    playwright.expect(page.locator("#caption textarea")).to_have_value("")
    page.set_input_files("#image input[type=file]", str(draw(tmp_path / "good.png", 2)))
    page.wait_for_selector("#caption-words label")


@pytest.mark.parametrize("theme, width", [("light", 1280), ("dark", 400)])
def test_the_page_fits_the_window_and_every_control_has_a_name(page, address, scene, tmp_path, width, theme
                                                                       ) -> None:  # fmt: skip
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(f"{address}?__theme={theme}")
    page.wait_for_selector("#image input[type=file]", state="attached")
    upload_and_caption(page, scene)
    for tab in ("Caption", "Ask", "Attention maps", "Encoders"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(600)
        page.screenshot(path=tmp_path / f"{tab}-{theme}-{width}.png", full_page=True)
        inner, total = page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
        assert total <= inner == width, tab
        assert page.evaluate(UNNAMED_CONTROLS) == [], tab


UNNAMED_CONTROLS = """[...document.querySelectorAll('input, textarea, button, select')]
  .filter(one => one.checkVisibility() && one.type != 'file' && !one.closest('[aria-hidden=true]'))
  .filter(one => !(one.labels?.length || one.ariaLabel || one.title || one.innerText?.trim()
                   || one.querySelector('img[alt]') || document.getElementById(one.getAttribute('aria-labelledby'))))
  .map(one => one.outerHTML.slice(0, 160))"""
