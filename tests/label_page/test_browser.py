"""The page in a real browser, where one is there: two people at once, with the keyboard alone and by clicks."""

import shutil
import threading

import jax
import numpy as np
import pytest

from tests.support.people import links

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
PAIRS = 24


@pytest.fixture
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as started:
        # Its own sandbox needs rights that containers do not give.
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.mark.slow
def test_two_people_label_24_pairs_in_browsers(browser, opened, over, tmp_path):
    oracle = opened(names=("anna", "ben"), undo_s=1.0)
    labels: dict[int, float] = {}

    def ask() -> None:
        prompts = [f"**Pair {row}**\n\n{HOSTILE}" for row in range(PAIRS)]
        first, second = [f"{HOSTILE} first" for _ in prompts], [f"{HOSTILE} second" for _ in prompts]
        swapped = np.array([row % 2 == 1 for row in range(PAIRS)])
        keys = jax.random.split(jax.random.key(0), PAIRS)
        names = [f"run/{row}" for row in range(PAIRS)]
        for judgement in oracle(prompts, first, second, swapped, keys, names, foreseen=[0.3] * PAIRS):
            labels.update(zip(judgement.rows.tolist(), judgement.label.tolist(), strict=True))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    pages, troubles = {}, []
    for name, width in (("anna", 1200), ("ben", 390)):
        page = browser.new_context(viewport={"width": width, "height": 844}).new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(links(tmp_path / "run")[name])
        playwright.expect(page.locator("#pair")).to_be_visible()
        assert page.url.endswith("/")  # the link's secret is gone from the address
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        pages[name] = page
    anna, ben = pages["anna"], pages["ben"]
    assert "guess" not in anna.inner_text("body")
    shown = anna.inner_text("#prompt")
    anna.keyboard.press("2")
    playwright.expect(anna.locator("#prompt")).not_to_have_text(shown)
    playwright.expect(anna.locator("#status")).to_contain_text("You said B. The model's guess was B, with 70%.")
    anna.keyboard.press("u")
    playwright.expect(anna.locator("#prompt")).to_contain_text(shown.splitlines()[0])  # taken back, and asked again
    said = 0
    while asking.is_alive() and said < 200:
        for page, key in ((anna, "t"), (ben, None)):
            if page.locator("#pair").is_hidden():
                page.wait_for_timeout(100)
                continue
            wins = "left" if page.inner_text("#left").endswith("first") else "right"
            if key is None:
                page.click(f"button[data-verdict={wins}]")
            else:
                page.keyboard.press({"left": "1", "right": "2"}[wins])
            page.wait_for_timeout(60)
            said += 1
    asking.join(30)
    assert labels == dict.fromkeys(range(PAIRS), 1.0)  # "first" won each time, whichever side it stood on
    assert troubles == []
    assert {page.title() for page in pages.values()} == {"Which response is better?"}
    over.set()
