"""The page on a real server with the tiny checkpoint: what streams in is what the engine says.

With GARSERVE_SCREENSHOTS=docs the pictures of docs/page.md are taken.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from garserve.engine import Engine
from tests.browser import CHROMIUM, NO_CHROMIUM, Page, browsing
from tests.conftest import PHOTO
from tests.page_steps import DONE, draw, show

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)]
QUESTION = "Where is <Prompt0> relative to <Prompt1>?"
# What the page sends, and each state of an answer that a person could have seen.
WATCH = """
window.sent = []; window.seen = new Set();
const plain = window.fetch;
window.fetch = (url, options) => { window.sent.push([url, options?.body]); return plain(url, options); };
new MutationObserver(() => {
  const last = [...document.querySelectorAll(".turn .answer")].at(-1);
  if (last) window.seen.add(last.textContent);
}).observe(document.getElementById("answers"), { childList: true, subtree: true, characterData: true });
"""


@pytest.fixture
def page(server: Any, tmp_path: Path) -> Iterator[Page]:
    with browsing(tmp_path) as tab:
        tab.window(1280, 800)
        tab.open(f"{server.url}/")
        tab.wait("document.getElementById('model').textContent === 'tiny'")
        tab.run(WATCH)
        yield tab
        assert tab.complaints == []


def sent(page: Page) -> dict[str, Any]:
    return json.loads(page.run("sent.at(-1)[1]"))


def keep(page: Page, name: str) -> None:
    if folder := os.environ.get("GARSERVE_SCREENSHOTS"):
        page.run("document.activeElement.blur()")
        time.sleep(0.5)  # until colours have faded over
        page.screenshot(Path(folder) / name)


def test_two_regions_and_their_relation(page: Page, tiny_reference: Engine) -> None:
    show(page)
    saucer = [(84, 200), (100, 150), (140, 100), (170, 82), (175, 130), (172, 180), (190, 225), (196, 300), (150, 330)]
    draw(page, "lasso", *saucer, (105, 280), (90, 230))
    draw(page, "box", (470, 300), (550, 395))
    page.click("#question")
    page.type("Where is")
    page.click("#names [data-region='0']")
    page.type(" relative to")
    page.click("#names [data-region='1']")
    page.type("?")
    page.press("Enter")
    page.wait(DONE.format(1))
    part, text = sent(page)["messages"][0]["content"]
    assert text["text"] == QUESTION
    lasso, box = part["regions"]
    assert np.allclose(box["box"], [470, 300, 550, 395], atol=1)
    expected = tiny_reference.ask(PHOTO, [lasso, box], QUESTION).text
    assert page.text(".turn .answer") == expected
    assert "<Prompt0>" in expected
    follow_up = "What colour is <Prompt0>?"
    page.type(follow_up)
    page.press("Enter")
    page.wait(DONE.format(2))
    chat = tiny_reference.chat(PHOTO, [lasso, box])
    chat.say(QUESTION)
    further = chat.say(follow_up).text
    assert page.text(".turn:last-child .answer") == further
    partial = {whole[:end] for whole in (expected, further) for end in range(1, len(whole))}
    assert partial & set(page.run("[...seen]")), "a busy server joins pieces, but not all of both answers"


def test_the_sample_is_described_at_one_click(page: Page, tiny_reference: Engine) -> None:
    page.window(1280, 800, density=1.5)
    page.click(".try-sample")
    page.wait(DONE.format(3))
    expected = [answer.text for answer in tiny_reference.describe(PHOTO, sent(page)["regions"])]
    assert page.run("[...document.querySelectorAll('.row .answer')].map((one) => one.innerText)") == expected
    page.click("#ideas button")
    page.press("Enter")
    page.wait(DONE.format(4))
    keep(page, "page.jpg")
    page.window(1280, 800, dark=True)
    draw(page, "box", (320, 235), (412, 335))
    page.press("r")
    page.wait("document.querySelector('#regions li:last-child .kind').textContent === 'Box, refined'")
    assert np.allclose(sent(page)["region"]["box"], [320, 235, 412, 335], atol=1)
    page.press("d")
    page.wait(DONE.format(8))
    regions = sent(page)["regions"]
    assert "rle" in regions[3]
    expected = [answer.text for answer in tiny_reference.describe(PHOTO, regions)]
    found = page.run("[...document.querySelectorAll('article:last-child .row .answer')].map((one) => one.innerText)")
    assert found == expected
    keep(page, "page-dark.jpg")
    page.window(390, 844, mobile=True, density=2)
    keep(page, "page-mobile.jpg")


def test_the_servers_refusal_is_shown(page: Page, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1360, 1360, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")  # 5.5 MB; the server takes 5
    show(page, tmp_path / "noise.png")
    draw(page, "box", (100, 100), (900, 900))
    page.click("#describe")
    page.see(".answer[data-state=failed]")
    assert page.text(".notice.error") == "image_url: more than 5242880 bytes"
    page.complaints[:] = [one for one in page.complaints if "status of 413" not in one]  # the browser notes it itself
