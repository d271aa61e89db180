"""Pictures of regions and answers: outlines, captions, and what is refused before anything is computed."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from garserve.demo import run_demo
from garserve.errors import GarserveError
from garserve.pictures import COLOURS, check_target, one_line, save_picture

pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install garserve[pictures])")

WIDE = 960  # pixels of every picture


def drawn(path: Path, mask: np.ndarray, *captions: str, note: str = "") -> np.ndarray:
    save_picture(path, np.full((*mask.shape, 3), 90, np.uint8), [mask], captions, note)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def is_outline(pixels: np.ndarray) -> np.ndarray:
    colour = [int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(pixels - colour) < 40).all(axis=-1)


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1), (1, 5000), (5000, 1)], ids=str)
def test_images_of_one_row_or_column(tmp_path: Path, shape: tuple[int, int]) -> None:
    mask = np.zeros(shape, bool)
    mask[: max(shape[0] // 2, 1), : max(shape[1] // 2, 1)] = True
    pixels = drawn(tmp_path / "p.png", mask, "said")
    assert pixels.shape[1] == WIDE
    assert pixels.shape[0] < 10_000  # matplotlib refuses more than 65,535
    assert shape[1] == 5000 or is_outline(pixels).any()


def test_outlines_run_between_pixels(tmp_path: Path) -> None:
    mask = np.zeros((100, 100), bool)
    mask[30:60, 20:80] = True
    pixels = is_outline(drawn(tmp_path / "p.png", mask))
    down, across = np.flatnonzero(pixels[:, WIDE // 3]), np.flatnonzero(pixels[WIDE * 2 // 5])
    for found, (first, last) in ((down, (30, 60)), (across, (20, 80))):
        assert abs(found.min() - first * WIDE / 100) < 4
        assert abs(found.max() - last * WIDE / 100) < 4


def test_outlines_close_at_the_edge_of_the_image(tmp_path: Path) -> None:
    mask = np.zeros((100, 100), bool)
    mask[:40, :30] = True
    pixels = is_outline(drawn(tmp_path / "p.png", mask))
    assert pixels[:2, 5:280].any(axis=0).all()
    assert pixels[5:380, :2].any(axis=1).all()
    assert not pixels[:WIDE, WIDE // 2 :].any()  # and the image has not moved
    assert not pixels[WIDE // 2 : WIDE].any()


def test_line_breaks_are_spaces(tmp_path: Path) -> None:
    assert one_line(" a\n\n\tb\x85c \x07\u2028d ") == "a b c \N{REPLACEMENT CHARACTER} d"
    mask = np.ones((10, 40), bool)
    broken = drawn(tmp_path / "a.png", mask, "First.\nSecond.\r\n- third", note="What\nis it? It is.\n")
    assert (broken == drawn(tmp_path / "b.png", mask, "First. Second. - third", note="What is it? It is.")).all()


def test_what_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_target(tmp_path / "new" / "p.png")
    (tmp_path / "d.png").mkdir()
    with pytest.raises(GarserveError, match=r"d\.png: expected a file that can be written"):
        check_target(tmp_path / "d.png")
    with pytest.raises(GarserveError, match=r"p\.bmp: expected a name that ends in one of \.png"):
        check_target(tmp_path / "p.bmp")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(GarserveError, match=r"p\.png: expected a folder that can be written to"):
        check_target(tmp_path / "p.png")


def test_without_matplotlib_nothing_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("garserve.pictures.find_spec", lambda name: None)
    engine: Any = None  # never asked
    with pytest.raises(GarserveError, match=r"pictures need matplotlib: pip install 'garserve\[pictures\]'"):
        next(iter(run_demo(engine, tmp_path / "p.png")))
    assert list(tmp_path.iterdir()) == []
