"""Questions about photographs of one's own, as tools/train_tiny/make_eval.py writes them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from garserve.evaluation.questions import read_questions
from tests.conftest import PHOTO, write_lines
from tests.train_tiny import training_module

make_eval = training_module("make_eval")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A photograph that lies on its side, and a mask beside it in the upright frame, 90 wide and 120 high."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    with Image.open(PHOTO) as photo:
        photo.convert("RGB").resize((120, 90)).save(tmp_path / "turned.png", exif=exif)
    mask = np.zeros((120, 90), np.uint8)
    mask[20:80, 10:50] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def test_questions_are_about_upright_photographs_and_masks_beside_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = [{"box": [10 * i, 60, 10 * i + 20, 110]} for i in range(5)]
    line = {"image": "turned.png", "regions": [{"mask": "mask.png"}, *boxes]}
    masks = write_lines(folder / "masks.jsonl", ["", line, " "])
    monkeypatch.chdir("/")
    make_eval.main(folder / "made", masks=masks)
    asked = read_questions(folder / "made")
    assert {Path(str(one.request.image)).name for one in asked} == {"own_0000.jpg", "own_0001.jpg"}  # six regions
    with Image.open(folder / "made" / "images" / "own_0000.jpg") as saved:
        assert saved.size == (90, 120)
    alone = [one for one in asked if one.form == "describe" and str(one.request.id).startswith("own_0000")]
    (region,) = alone[0].request.parsed_regions()
    assert region.mask(120, 90)[20:80, 10:50].all()


def test_a_line_that_cannot_be_used_is_named(folder: Path) -> None:
    line = {"image": "turned.png", "regions": [{"mask": "mask.png"}]}
    masks = write_lines(folder / "masks.jsonl", [line, "", "{"])
    with pytest.raises(SystemExit, match=r"masks\.jsonl: line 3: not JSON"):
        make_eval.main(folder / "made", masks=masks)
