"""The page in a headless browser, against a server that tells back what it was sent."""

import base64
import io
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from garserve.demo import REGIONS
from garserve.inputs.images import load_image
from garserve.inputs.regions import Region
from tests.browser import CHROMIUM, NO_CHROMIUM, Page, browsing
from tests.conftest import PHOTO
from tests.page_server import make_app, said, serving
from tests.page_steps import DONE, IDLE, at, draw, show

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)


@pytest.fixture(scope="module")
def bodies() -> list[dict[str, Any]]:
    """What the server got, in order."""
    return []


@pytest.fixture(scope="module")
def base(bodies: list[dict[str, Any]]) -> Iterator[str]:
    with serving(make_app(bodies, pace=0.02)) as address:
        yield address


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(tab: Page, base: str) -> Iterator[Page]:
    """The page as it opens, on a desktop; afterwards nothing may have been refused or gone wrong in it."""
    tab.complaints.clear()
    tab.window(1280, 860)
    tab.open(base)
    tab.run("sessionStorage.clear()")
    tab.wait("document.getElementById('model').textContent === 'echo'")
    yield tab
    assert tab.complaints == []


def describe(page: Page, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Describe the regions on the page; returns them as the server got them."""
    count = len(bodies)
    page.click("#describe")
    page.wait(f"document.querySelectorAll('.answer[data-state=done]').length > 0 && {IDLE}")
    assert len(bodies) == count + 1
    return bodies[-1]["regions"]


def ask(page: Page, question: str, answers: int) -> None:
    page.click("#question")
    page.type(question)
    page.press("Enter")
    page.wait(DONE.format(answers))


def test_each_tool_sends_its_form(page: Page, bodies: list[dict[str, Any]]) -> None:
    show(page)
    draw(page, "box", (480, 300), (500, 320), (540, 395))
    ring = [(290 + 80 * np.cos(t), 145 + 45 * np.sin(t)) for t in np.linspace(0, 2 * np.pi, 40)]
    draw(page, "lasso", *ring)
    draw(page, "scribble", (110, 200), (120, 280), (170, 340))
    draw(page, "point", (366, 283))
    box, lasso, scribble, point = describe(page, bodies)
    assert np.allclose(box["box"], [480, 300, 540, 395], atol=1)
    drawn, wanted = Region.parse(lasso).mask(400, 600), Region.from_polygon(ring).mask(400, 600)
    assert (drawn & wanted).sum() / (drawn | wanted).sum() > 0.97
    assert len(lasso["polygon"]) < 40
    assert np.allclose(scribble["scribble"], [(110, 200), (120, 280), (170, 340)], atol=1)
    assert scribble["width"] == 20
    assert np.allclose(point["points"], [(366, 283)], atol=1)
    assert point["radius"] == 10
    assert base64.b64decode(bodies[-1]["image"].split(",")[1]) == PHOTO.read_bytes()
    texts = page.run("[...document.querySelectorAll('.row')].map((row) => row.innerText.split('\\n')[0])")
    assert page.run("[...document.querySelectorAll('.row .badge')].map((one) => one.textContent)") == list("0123")
    assert texts == list("0123") or texts[0].startswith("0")
    assert "A region given as a scribble." in page.text(".row:nth-of-type(3)")


def test_a_fifth_region_is_the_last(page: Page) -> None:
    show(page)
    for k in range(5):
        draw(page, "box", (100 * k, 50), (100 * k + 60, 120))
    page.drag(*at(page, (100, 200), (200, 300)))
    page.see(".notice.error")
    assert "takes 5 regions at once" in page.text(".notice.error")
    assert page.run("document.querySelectorAll('#regions li').length") == 5


def test_without_a_mouse(page: Page, bodies: list[dict[str, Any]]) -> None:
    show(page)
    page.run("document.activeElement.blur()")
    way = []
    for _ in range(40):
        page.press("Tab")
        way.append(page.run("document.activeElement.id || document.activeElement.dataset.tool"))
        if way[-1] == "question":
            break
    order = ["help", "theme", "settings", "move", "box", "point", "auto", "canvas", "closer", "talk", "question"]
    assert [name for name in way if name in order] == order
    page.press("Escape")
    page.run("document.getElementById('canvas').focus()")
    page.press("b")
    page.press(" ")  # the pen goes down in the middle: 300, 200
    page.press("ArrowRight", "Shift", times=5)
    page.press("ArrowDown", "Shift", times=4)
    page.press("Enter")
    page.press("ArrowLeft", times=3)  # the box is selected: arrows move it
    page.press("ArrowDown", "Control", times=2)
    page.press("d")
    page.wait(DONE.format(1))
    assert bodies[-1]["regions"] == [{"box": [297, 200, 347, 242]}]
    page.press("z", "Control")
    page.press("z", "Control")
    page.press("z", "Control", "Shift")
    page.press("d")
    page.wait(DONE.format(2))
    assert bodies[-1]["regions"] == [{"box": [297, 200, 347, 240]}]
    page.press("p")
    page.press("Escape")
    page.press("ArrowUp", "Shift")
    page.press(" ")
    page.wait("document.querySelectorAll('#regions li').length === 2")
    page.press("0")
    page.press("Delete")
    page.press("d")
    page.wait(DONE.format(3))
    assert bodies[-1]["regions"] == [{"points": [[300, 190]], "radius": 20 / 2}]
    assert "Region 0 deleted" not in page.text("#said")  # the answer is what was said last
    page.press("q")
    assert page.run("document.activeElement.id") == "question"


def test_more_points_without_a_mouse(page: Page, bodies: list[dict[str, Any]]) -> None:
    show(page)
    draw(page, "point", (100, 100))
    draw(page, "point", (300, 200))
    page.run("document.getElementById('canvas').focus()")
    page.press(" ", "Shift")
    page.press("ArrowRight", "Shift", times=3)
    page.press(" ")
    assert page.text("#said") == "<Prompt1> has 2 points."
    page.press("0")
    page.press(" ", "Shift")
    page.press("ArrowDown", "Shift")
    page.press(" ", "Shift")
    page.press(" ", "Shift")
    page.press("ArrowDown", "Shift")
    page.press("Delete")  # of the region that the pen was to be led for
    page.press(" ")
    assert [region["points"] for region in describe(page, bodies)] == [[[300, 200], [330, 200]]]
    page.press("z", "Control")
    first, second = describe(page, bodies)
    assert (first["points"], second["points"]) == ([[100, 100], [100, 110]], [[300, 200], [330, 200]])


def test_the_enlarged_picture_follows_the_pen(page: Page, bodies: list[dict[str, Any]]) -> None:
    def pen_in_sight(x: int, y: int) -> bool:
        assert page.text("#said").startswith(f"Pen at {x}, {y}")
        [(left, top)] = at(page, (x, y))
        frame = "(({ left, top, right, bottom }) => [left, top, right, bottom])"
        edges = page.run(f"{frame}(document.getElementById('canvas').getBoundingClientRect())")
        return edges[0] <= left <= edges[2] and edges[1] <= top <= edges[3]

    show(page)
    page.run("document.getElementById('canvas').focus()")
    whole = page.run("document.getElementById('canvas').dataset.view")
    page.press("+", times=6)
    page.wait(f"document.getElementById('canvas').dataset.view !== '{whole}'")
    for key, end in (
        ("ArrowRight", (600, 200)),
        ("ArrowDown", (600, 400)),
        ("ArrowLeft", (0, 400)),
        ("ArrowUp", (0, 0)),
    ):
        page.press(key, "Shift", times=60)
        page.run("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        assert pen_in_sight(*end), key
    page.press(" ")
    page.press("ArrowRight", "Shift")
    page.press("ArrowDown", "Shift")
    page.press(" ")
    page.press("-", times=6)
    assert describe(page, bodies) == [{"box": [0, 0, 10, 10]}]


def test_corners_and_moves_by_mouse(page: Page, bodies: list[dict[str, Any]]) -> None:
    show(page)
    draw(page, "box", (100, 100), (200, 200))
    page.drag(*at(page, (200, 200), (230, 210), (260, 220)))
    assert np.allclose(describe(page, bodies)[0]["box"], [100, 100, 260, 220], atol=1)
    page.click("[data-tool=move]")
    page.drag(*at(page, (150, 150), (100, 100), (0, 160)))  # no farther than the edge
    assert np.allclose(describe(page, bodies)[0]["box"], [0, 110, 160, 230], atol=1)
    page.press("z", "Control")
    assert np.allclose(describe(page, bodies)[0]["box"], [100, 100, 260, 220], atol=1)


def test_a_conversation(page: Page, bodies: list[dict[str, Any]]) -> None:
    show(page)
    draw(page, "box", (100, 100), (200, 200))
    draw(page, "box", (300, 100), (400, 200))
    page.type("")
    page.click("#question")
    page.type("Where is")
    page.click("#names [data-region='1']")
    page.type(" relative to")
    page.click("#names [data-region='0']")
    page.type("?")
    page.press("Enter")
    page.wait(DONE.format(1))
    assert page.text(".answer").strip() == "You said: Where is <Prompt1> relative to <Prompt0>?"
    colours = page.run(
        """[...document.querySelectorAll('.answer .name')].map((name) => getComputedStyle(name).boxShadow)"""
    )
    assert ["86, 180, 233" in colours[0], "230, 159, 0" in colours[1]] == [True, True]
    first = bodies[-1]["messages"][0]["content"]
    assert [part["type"] for part in first] == ["image_url", "text"]
    assert len(first[0]["regions"]) == 2
    ask(page, "And why?", 2)
    turns = bodies[-1]["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[1]["content"].strip() == "You said: Where is <Prompt1> relative to <Prompt0>?"
    assert said(turns[2]) == "And why?"
    page.run("document.querySelector('[aria-label=\"Take the last question back\"]').click()")
    page.wait(DONE.format(1))
    assert page.run("document.getElementById('question').value") == "And why?"
    page.run("document.getElementById('question').value = ''")
    draw(page, "point", (500, 300))  # other regions: another conversation
    ask(page, "What is <Prompt2>?", 2)
    assert len(bodies[-1]["messages"]) == 1
    assert page.run("document.querySelectorAll('article.past').length") == 1


def test_stop_and_faults(page: Page, bodies: list[dict[str, Any]]) -> None:
    show(page)
    draw(page, "box", (100, 100), (200, 200))
    page.click("#question")
    page.type("Is <Prompt3> red?")
    page.press("Enter")
    page.see(".notice.error")
    assert "<Prompt3> is not marked on the picture" in page.text(".notice.error")
    page.run("document.getElementById('question').select()")
    page.type("word " * 200)
    page.press("Enter")
    partial = page.wait("document.querySelector('.answer[data-state=streaming]')?.textContent")
    assert ("You said: " + "word " * 200).startswith(partial.strip())
    page.click("#send")
    page.see(".answer[data-state=stopped]")
    page.click("#question")
    page.type("429")
    page.press("Enter")
    page.see(".answer[data-state=failed]")
    assert page.text(".notice.error") == "Too many requests. Try again in 7 s."
    page.run("document.getElementById('question').select()")
    page.type("401")
    page.press("Enter")
    page.wait("document.getElementById('settings-dialog').open")
    page.click("#key")
    page.type("secret key")
    page.press("Enter")
    page.wait("!document.getElementById('settings-dialog').open")
    page.run("document.getElementById('question').value = ''")
    ask(page, "Now?", 1)
    assert bodies[-1]["key"] == "Bearer secret key"
    assert page.run("[localStorage.length, sessionStorage.getItem('garserve-key')]") == [0, "secret key"]
    page.click("#code")
    assert "secret" not in page.text("#code-text")
    page.press("Escape")
    page.complaints[:] = [one for one in page.complaints if "status of 4" not in one]  # the browser notes these itself


def test_a_deleted_region_leaves_the_others_their_names(page: Page, bodies: list[dict[str, Any]]) -> None:
    show(page)
    for k in range(3):
        draw(page, "box", (100 * k, 50), (100 * k + 60, 120))
    page.click("#question")
    page.type("Is <Prompt2> above <Prompt1>?")
    page.click("[aria-label='Delete <Prompt0>']")
    assert page.run("document.activeElement.getAttribute('aria-label')") == "Delete <Prompt0>"  # the next one's
    assert page.run("document.getElementById('question').value") == "Is <Prompt1> above <Prompt0>?"
    page.click("#send")
    page.wait(DONE.format(1))
    assert [region["box"][0] for region in bodies[-1]["messages"][0]["content"][0]["regions"]] == [100, 200]


@pytest.mark.parametrize(
    "question", ["", "Is <Prompt0> $HOME or `id` or \\n 'here' \"there\"? Ünï [ 1,  2 ]"], ids=["all", "ask"]
)
@pytest.mark.parametrize("language", ["curl", "python"])
def test_the_code_asks_the_same(
    page: Page,
    bodies: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    language: str,
    question: str,
) -> None:
    named = tmp_path / "it's a $(photo).jpg"
    named.write_bytes(PHOTO.read_bytes())
    show(page, named)
    draw(page, "scribble", (110, 200), (120, 280), (170, 340))
    draw(page, "box", (320, 235), (412, 335))
    page.run("document.querySelectorAll('#regions .quiet')[2].click()")
    page.wait("document.querySelectorAll('#regions .kind')[1].textContent === 'Box, refined'")
    page.click("#question")
    page.type(question)
    page.click("#code")
    page.click(f"[data-language={language}]")
    code = page.text("#code-text")
    page.press("Escape")
    if question:
        page.click("#send")
        page.wait(DONE.format(1))
    else:
        describe(page, bodies)
    asked = {**bodies[-1]}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    if language == "python":
        exec(compile(code, "code", "exec"), {})
        printed = capsys.readouterr().out
    else:
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    told = {**bodies[-1]}
    for body in (asked, told):
        body.pop("stream", None)
        body.pop("key", None)
    assert told == asked
    assert ("$HOME" if question else "given as a scribble") in printed


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_the_server_sees_the_pixels_of_the_screen(
    page: Page, bodies: list[dict[str, Any]], tmp_path: Path, picture: np.ndarray
) -> None:
    """Turned, transparent, grey and palette pictures: regions count the pixels that the server sees."""
    turned = Image.Exif()
    turned[0x0112] = 6
    glass = Image.fromarray(np.dstack([picture, np.where(picture[..., 0] > 90, 255, 0).astype(np.uint8)]))
    files = {
        "turned.jpg": encoded(Image.fromarray(picture), "JPEG", exif=turned),
        "turned.png": encoded(Image.fromarray(picture), "PNG", exif=turned),
        "glass.png": encoded(glass, "PNG"),
        "grey.png": encoded(Image.fromarray(picture).convert("L"), "PNG"),
        "palette.gif": encoded(Image.fromarray(picture).quantize(16), "GIF"),
        "plain.bmp": encoded(Image.fromarray(picture), "BMP"),
        "plain.webp": encoded(Image.fromarray(picture), "WEBP", lossless=True),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        show(page, path)
        draw(page, "box", (10, 10), (50, 60))
        describe(page, bodies)
        assert np.array_equal(load_image(bodies[-1]["image"]), load_image(path)), name
    path.write_bytes(b"no picture")
    page.choose_file("#file", path)
    page.see(".notice.error")
    assert "cannot read it as a picture" in page.text(".notice.error")


def test_masks_are_read_as_coco_writes_them(page: Page, base: str) -> None:
    from pycocotools import mask as coco

    rng = np.random.default_rng(3)
    for height, width, share in ((1, 1, 1.0), (7, 5, 0.5), (40, 60, 0.02), (300, 200, 0.9)):
        mask = (rng.random((height, width)) < share).astype(np.uint8)
        text = coco.encode(np.asfortranarray(mask))["counts"].decode()
        given = f"{{size: [{height}, {width}], counts: {text!r}}}"
        found = page.run(f"import('{base}page/rle.js').then((rle) => [...rle.decode({given})])")
        assert found == mask.ravel().tolist()


def test_the_sample_is_the_demo(page: Page, bodies: list[dict[str, Any]]) -> None:
    page.click(".try-sample")
    page.wait(DONE.format(3))
    shown = [Region.parse(region).mask(400, 600) for region in bodies[-1]["regions"]]
    wanted = [region.mask(400, 600) for region in REGIONS.values()]
    assert all(np.array_equal(mask, other) for mask, other in zip(shown, wanted, strict=True))


def test_a_finger_on_a_small_screen(page: Page, bodies: list[dict[str, Any]]) -> None:
    page.window(390, 844, mobile=True, density=2)
    show(page)
    assert page.run("document.documentElement.scrollWidth") == 390
    page.touch(*at(page, (100, 100), (150, 150), (200, 250)))
    page.wait("document.querySelectorAll('#regions li').length === 1")
    page.run("document.getElementById('describe').click()")
    page.wait(DONE.format(1))
    assert np.allclose(bodies[-1]["regions"][0]["box"], [100, 100, 200, 250], atol=2)


def test_a_finger_gives_a_region_more_points(page: Page, bodies: list[dict[str, Any]]) -> None:
    page.window(390, 844, mobile=True, density=2)
    show(page)
    page.run("document.querySelector('[data-tool=point]').click()")
    page.touch(*at(page, (100, 100)))
    page.wait("document.querySelectorAll('#regions li').length === 1")
    more = "[aria-label='More points of <Prompt0>']"
    page.run(f'document.querySelector("{more}").click()')
    for point in ((200, 100), (300, 200)):
        page.touch(*at(page, point))
    page.wait("document.querySelector('#regions .kind').textContent === 'Points'")
    assert page.run(f'document.querySelector("{more}").ariaPressed') == "true"
    page.run(f'document.querySelector("{more}").click()')
    page.touch(*at(page, (400, 300)))
    page.wait("document.querySelectorAll('#regions li').length === 2")
    page.run("document.getElementById('describe').click()")
    page.wait(DONE.format(2))
    first, second = bodies[-1]["regions"]
    assert np.allclose(first["points"], [(100, 100), (200, 100), (300, 200)], atol=2)
    assert np.allclose(second["points"], [(400, 300)], atol=2)


def test_a_browser_that_keeps_nothing(page: Page, base: str, bodies: list[dict[str, Any]]) -> None:
    """Where a person blocks storage, to touch it is an error. The page works, with a key until it is left."""
    blocked = "get() { throw new DOMException('Access is denied', 'SecurityError'); }"
    code = (
        f"for (const name of ['sessionStorage', 'localStorage']) Object.defineProperty(window, name, {{ {blocked} }});"
    )
    script = page.send("Page.addScriptToEvaluateOnNewDocument", source=code)["identifier"]
    try:
        page.open(base)
        page.wait("document.getElementById('model').textContent === 'echo'")
        show(page)
        draw(page, "box", (100, 100), (200, 200))
        page.click("#settings")
        page.click("#key")
        page.type("secret key")
        page.press("Enter")
        page.wait("!document.getElementById('settings-dialog').open")
        ask(page, "Now?", 1)
        assert bodies[-1]["key"] == "Bearer secret key"
    finally:
        page.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


def test_dark_and_light(page: Page) -> None:
    def ground() -> int:
        return sum(map(int, re.findall(r"\d+", page.run("getComputedStyle(document.body).backgroundColor"))[:3]))

    assert ground() > 600
    page.window(1280, 860, dark=True)
    assert ground() < 120
    page.click("#theme")
    assert ground() > 600
    page.open(page.run("location.href"))
    assert ground() > 600
    page.run("localStorage.clear()")


def test_files_of_the_page(base: str) -> None:
    first = httpx.get(base, trust_env=False)
    assert "unsafe" not in first.headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in first.headers["Content-Security-Policy"]
    again = httpx.get(base, headers={"If-None-Match": first.headers["ETag"]}, trust_env=False)
    assert (again.status_code, again.content) == (304, b"")
    for name in ("../regions.py", "%2e%2e%2fregions.py", "..%2f..%2fdata/coffee.jpg", "none.js", "", "page/main.js"):
        assert httpx.get(base + "page/" + name, trust_env=False).status_code == 404
    for name, kind in (("main.js", "text/javascript"), ("style.css", "text/css"), ("sample.jpg", "image/jpeg")):
        assert httpx.get(base + "page/" + name, trust_env=False).headers["Content-Type"].startswith(kind)
