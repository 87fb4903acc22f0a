"""The page in a real browser: Chromium, headless, driven by playwright.

`COLBERT_JAX_CHROMIUM` names the browser, if it is not on the path as chromium.
"""

import os
import shutil
import threading

import pytest

from colbert_jax import Retriever

SERVE = 'needs pip install "colbert-jax[serve]"'
uvicorn = pytest.importorskip("uvicorn", reason=SERVE)
create_app = pytest.importorskip("colbert_jax.serving.app", reason=SERVE).create_app
server = pytest.importorskip("colbert_jax.serving.server", reason=SERVE)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")

MARKUP = '<img src=x onerror="window.ran=1"><script>window.ran=1</script> a cat & "dog" 🐈 runs'


@pytest.fixture(scope="module")
def address(model, texts, tmp_path_factory):
    records = [
        {"id": f"d{n}", "text": text, "year": 2000 + n % 2} for n, text in enumerate(texts[:20])
    ]
    records.append({"id": "<b>markup</b>", "text": MARKUP, "year": 1900, "lang": "<i>en</i>"})
    path = tmp_path_factory.mktemp("page") / "books"
    books = Retriever.build(path, model, records)
    one = uvicorn.Server(server._configured(create_app(books, refresh_seconds=0)))
    listening = server._listen("127.0.0.1", 0)
    thread = threading.Thread(target=one.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    one.should_exit = True
    thread.join(30)
    listening.close()


@pytest.fixture(scope="module")
def browser():
    place = os.environ.get("COLBERT_JAX_CHROMIUM") or shutil.which("chromium")
    if place is None:
        pytest.skip("no chromium: install one, or name it in COLBERT_JAX_CHROMIUM")
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=place, args=["--no-sandbox"]) as browser,
    ):
        yield browser


@pytest.fixture
def page(browser, address):
    """The page, of which every request and every error is noted."""
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.goto(address)
    playwright.expect(page.locator("#status")).to_contain_text("documents")
    yield page
    assert errors == [] and all(url.startswith((address, "data:")) for url in asked)
    page.close()


def search(page, query):
    page.fill("#query", query)
    page.press("#query", "Enter")
    playwright.expect(page.locator("#status")).to_contain_text("results in")
    return page.locator("#results li")


@pytest.mark.slow
def test_search_shades_words_that_match(page):
    results = search(page, "running cats")
    assert results.count() == 10
    first = results.first
    assert first.locator(".words mark").all_text_contents() == ["running", "cats"]
    colours = first.locator(".text mark").evaluate_all(
        "all => all.map(m => m.style.backgroundColor)"
    )
    assert len(set(colours)) > 1
    first.locator(".words mark").first.hover()
    assert first.locator("mark.on").count() == 2


@pytest.mark.slow
def test_no_text_runs_as_script(page):
    page.locator("#more summary").click()
    page.select_option("#field", "lang")
    page.select_option("#operator", "exists")
    results = search(page, "a <b>cat</b>")
    assert results.count() == 1
    assert results.first.locator(".text").text_content() == MARKUP
    assert "<b>markup</b>" in results.first.locator(".head").text_content()
    assert "<i>en</i>" in results.first.locator(".head").text_content()
    assert results.first.locator("img, script, b b, i").count() == 0
    assert page.evaluate("window.ran") is None


@pytest.mark.slow
def test_filter_keyboard_and_errors(page):
    page.locator("#more summary").click()
    page.select_option("#field", "year")
    page.select_option("#operator", "gte")
    page.fill("#value", "2001")
    results = search(page, "heat")
    assert results.count() == 10
    assert all("year: 2001" in text for text in results.locator(".head").all_text_contents())

    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert (
        page.evaluate("[...document.querySelectorAll('li')].indexOf(document.activeElement)") == 1
    )

    page.fill("#value", "soon")
    page.select_option("#operator", "contains")
    page.fill("#query", "heat")
    page.press("#query", "Enter")
    playwright.expect(page.locator("#status")).to_contain_text("0 results")


@pytest.mark.slow
def test_a_narrow_screen_needs_no_scrolling_sideways(page):
    page.set_viewport_size({"width": 340, "height": 700})
    search(page, "running cats")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 340


@pytest.mark.slow
def test_the_list_of_addresses(browser, address):
    page = browser.new_page()
    page.goto(address + "docs")
    page.wait_for_selector("details")
    assert page.locator("details").count() > 10
    page.locator("details").first.click()
    assert page.locator("pre").first.is_visible()
    page.close()
