"""What a person does on the page, for its tests."""

from pathlib import Path

from tests.browser import Page
from tests.conftest import PHOTO

# An answer may be shown as done before its stream has ended; until then the page takes no other question.
IDLE = "document.getElementById('send').dataset.busy === 'false'"
DONE = f"document.querySelectorAll('.answer[data-state=done]').length === {{}} && {IDLE}"


def show(page: Page, path: Path = PHOTO) -> None:
    page.run("delete document.getElementById('canvas').dataset.view")
    page.choose_file("#file", path)
    page.wait("document.getElementById('canvas').dataset.view")


def at(page: Page, *points: tuple[float, float]) -> list[tuple[float, float]]:
    """Where points of the picture are in the window."""
    x, y, scale = map(float, page.run("document.getElementById('canvas').dataset.view").split())
    left, top = page.run("(({ x, y }) => [x, y])(document.getElementById('canvas').getBoundingClientRect())")
    return [(left + x + px * scale, top + y + py * scale) for px, py in points]


def draw(page: Page, tool: str, *points: tuple[float, float]) -> None:
    before = page.run("document.querySelectorAll('#regions li').length")
    page.click(f"[data-tool={tool}]")
    page.drag(*at(page, *points))
    page.wait(f"document.querySelectorAll('#regions li').length === {before + 1}")
