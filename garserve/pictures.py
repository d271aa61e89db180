"""Pictures of regions and what was said about them (floor 5)."""

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from garserve.errors import GarserveError
from garserve.inputs.shapes import Mask
from garserve.targets import unwritable

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

# Okabe and Ito's colours: told apart by people with any colour vision.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442")
_WIDTH_INCHES = 8.0
_TALLEST_INCHES = 80.0  # what an image may take: matplotlib draws at most 65,535 pixels of a side
_LINE_INCHES = 0.24
_FONT_POINTS = 10
_LONGEST = 600  # characters of a caption that are shown
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


def save_picture(
    path: Path, image: NDArray[np.uint8], masks: Sequence[Mask], captions: Sequence[str], note: str = ""
) -> None:
    """Save the image with each region tinted, outlined and numbered, and its caption in its colour underneath.

    `image` is RGB [H, W, 3], `masks` are boolean [H, W]. Needs matplotlib (`pip install garserve[pictures]`).
    An image of more than ten times its width is drawn smaller. Raises GarserveError where the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=120, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    paragraphs = [(_name(i), COLOURS[i % len(COLOURS)], _lines(text, canvas)) for i, text in enumerate(captions)]
    if note:
        paragraphs.append(("", "#555555", _lines(note, canvas)))
    rows = sum(len(lines) for _, _, lines in paragraphs) + 0.7 * len(paragraphs)
    height, width = image.shape[:2]
    shown = min(_WIDTH_INCHES * height / width, _TALLEST_INCHES)
    total = shown + _LINE_INCHES * (rows + 0.7)
    figure.set_size_inches(_WIDTH_INCHES, total)
    axes = figure.add_axes((0, 1 - shown / total, 1, shown / total))
    axes.imshow(_tint(image, masks), interpolation="antialiased")
    axes.set_axis_off()
    axes.autoscale(False)  # outlines may lie on the image's edge, and none moves it
    # With a pixel of outside around it, an outline closes at the edge, and one row or column has one, too.
    columns, rows_of = np.arange(-1, width + 1), np.arange(-1, height + 1)
    for i, mask in enumerate(masks):
        colour = COLOURS[i % len(COLOURS)]
        axes.contour(columns, rows_of, np.pad(mask, 1), levels=[0.5], colors=[colour], linewidths=2)
        y, x = _label_place(mask)
        axes.text(
            x, y, _name(i), color="white", weight="bold", ha="center", va="center", bbox={"facecolor": colour, "lw": 0}
        )
    cursor = total - shown - 0.7 * _LINE_INCHES
    for name, colour, lines in paragraphs:
        if name:
            figure.text(0.02, cursor / total, name, color=colour, weight="bold", va="top", fontsize=_FONT_POINTS)
        for line in lines:
            # `$` would start a formula.
            figure.text(
                0.06 if name else 0.02, cursor / total, line.replace("$", r"\$"), va="top", fontsize=_FONT_POINTS
            )
            cursor -= _LINE_INCHES
        cursor -= 0.7 * _LINE_INCHES
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a character that no font here has is drawn as a box
            figure.savefig(path)
    except OSError as error:
        raise GarserveError(f"picture {path}: cannot be written ({error.strerror or error})") from None


def check_target(path: Path) -> None:
    """Make the folder of a picture to come; GarserveError where the picture could not be drawn or written."""
    if find_spec("matplotlib") is None:
        raise GarserveError("pictures need matplotlib: pip install 'garserve[pictures]'")
    if path.suffix.lower() not in _SUFFIXES:
        raise GarserveError(f"picture {path}: expected a name that ends in one of {', '.join(_SUFFIXES)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GarserveError(f"picture {path}: its folder cannot be made ({error.strerror or error})") from None
    if wrong := unwritable(path):
        raise GarserveError(f"picture {path}: {wrong}")


def one_line(text: str) -> str:
    """Return a text as pictures show it: its white space as single spaces, what else has no shape as U+FFFD."""
    spaced = " ".join(text.split())
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in spaced)


def _name(position: int) -> str:
    return str(position)


def _lines(text: str, canvas: "FigureCanvasAgg") -> list[str]:
    """Break a text into lines that fit beside its number, by their width as drawn."""
    from matplotlib.font_manager import FontProperties

    renderer, font = canvas.get_renderer(), FontProperties(size=_FONT_POINTS)
    room = 0.92 * _WIDTH_INCHES * canvas.figure.dpi

    def fits(line: str) -> bool:
        return bool(renderer.get_text_width_height_descent(line, font, ismath=False)[0] <= room)

    lines = [""]
    for word in shorten(one_line(text), _LONGEST, placeholder=" …").split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if fits(longer):
            lines[-1] = longer
            continue
        left = word
        while not fits(left):  # wider than the picture: a script without spaces
            cut = next(n for n in range(len(left) - 1, 0, -1) if fits(left[:n]))
            lines.append(left[:cut])
            left = left[cut:]
        lines.append(left)
    return [line for line in lines if line] or ["(empty)"]


def _tint(image: NDArray[np.uint8], masks: Sequence[Mask]) -> NDArray[np.uint8]:
    """Mix each region's colour into its pixels, at a third of its strength."""
    from matplotlib.colors import to_rgb

    tinted = image.astype(np.float32)
    for i, mask in enumerate(masks):
        colour = np.asarray(to_rgb(COLOURS[i % len(COLOURS)]), dtype=np.float32) * 255
        tinted[mask] = tinted[mask] * 0.66 + colour * 0.34
    return tinted.round().astype(np.uint8)


def _label_place(mask: Mask) -> tuple[float, float]:
    """A pixel inside the region near its middle: the row and column (y, x) closest to the centre of mass."""
    rows, columns = np.nonzero(mask)
    nearest = int(np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2))
    return float(rows[nearest]), float(columns[nearest])
