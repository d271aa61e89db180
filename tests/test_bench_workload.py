"""What `garserve bench` asks: pictures that nobody has seen, and files of real masks as a batch would read them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from garserve.batch.bundles import Bundle
from garserve.batch.prepare import Preparation, Preparer, encoded
from garserve.batch.sources import each_region, open_source
from garserve.bench.real import photographs, real_workload
from garserve.bench.workload import make_workload, picture
from garserve.cli import app
from garserve.errors import InputError
from tests.conftest import PHOTO, write_lines

runner = CliRunner()


def _quarters(pixels: np.ndarray) -> list[bytes]:
    height, width = (side // 2 for side in pixels.shape[:2])
    return [pixels[y : y + height, x : x + width].tobytes() for y in (0, height) for x in (0, width)]


def test_pictures_differ_in_every_part_also_where_their_shifts_come_again() -> None:
    size, shifts = (32, 20), 160
    numbers = [*range(3 * shifts), 10**9, 10**10]
    parts = [_quarters(picture(number, size)) for number in numbers]
    assert all(len(set(column)) == len(numbers) for column in zip(*parts, strict=True))
    assert np.array_equal(picture(10**9, size), picture(10**9, size))


def test_the_first_pictures_are_the_photograph_as_it_is() -> None:
    size = (120, 90)
    with Image.open(PHOTO) as photo:
        whole = np.asarray(photo.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    for number in (0, 1, 30, 359):
        assert np.array_equal(picture(number, size), np.roll(whole, (7 * number, 13 * number), axis=(0, 1)))


@pytest.mark.parametrize("size", [(2, 2), (2, 700), (3, 2)])
def test_the_smallest_images_have_room_for_regions(size: tuple[int, int]) -> None:
    for request in make_workload("dense", 1, size, max_tokens=8).requests:
        assert request.image.shape == (size[1], size[0], 3)
        assert np.asarray(request.regions[0]).any()


def test_a_thumbnail_of_later_pictures_differs(tmp_path: Path) -> None:
    thumbnails = []
    for number in (0, 1920, 2 * 1920):  # the same shift at this size
        Image.fromarray(picture(number, (640, 480))).save(tmp_path / "picture.jpg", quality=90)
        with Image.open(tmp_path / "picture.jpg") as saved:
            thumbnails.append(np.asarray(saved.resize((168, 168)), dtype=float))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(thumbnails[one] - thumbnails[other]).mean() > 2


def test_seeds_of_a_load_share_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[set[str]] = []

    class _SentError(Exception):
        pass

    def send(url: str, requests: list[dict[str, Any]], *_: Any, warm: list[dict[str, Any]], **__: Any) -> None:
        sent.append({one["messages"][0]["content"][0]["image_url"]["url"] for one in [*requests, *warm]})
        raise _SentError

    monkeypatch.setattr("garserve.bench.serve.serve", send)
    arguments = ["bench", "serve", "http://127.0.0.1:9", "--workload", "stream", "--size", "120x90"]
    for seed, images in (("0", "9"), ("1", "4"), ("2", "4"), ("9999", "4")):
        runner.invoke(app, [*arguments, "--seed", seed, "--images", images])
    assert [len(one) for one in sent] == [10, 5, 5, 5]
    assert len(set().union(*sent)) == 25


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A photograph that lies on its side, with masks beside it in the upright frame, 40 wide and 60 high."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "turned.png", exif=exif)
    values = np.zeros((60, 40), np.uint8)
    values[5:20, 3:11], values[30:50, 20:35] = 7, 9
    Image.fromarray(values).save(tmp_path / "values.png")
    Image.fromarray((values == 9).astype(np.uint8) * 255).save(tmp_path / "mask.png")
    regions = [{"mask": "mask.png"}, {"mask": "values.png", "value": 7}, {"box": [2, 40, 30, 58]}]
    line = {"image": "images/turned.png", "regions": regions}
    write_lines(tmp_path / "masks.jsonl", ["", line, "   ", line | {"regions": [[1, 1, 9, 9]]}, ""])
    return tmp_path


def test_files_of_masks_are_read_as_a_batch_reads_them(
    folder: Path, mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    found = list(photographs(folder / "masks.jsonl"))
    assert [len(one.masks) for one in found] == [3, 1]
    with Image.open(folder / "images" / "turned.png") as lying:
        assert np.array_equal(found[0].image, np.rot90(np.asarray(lying), -1))
    assert found[0].masks[0][30:50, 20:35].all()
    assert found[0].masks[0].sum() == 20 * 15
    assert found[0].masks[1].sum() == 15 * 8
    workload = real_workload(folder / "masks.jsonl", max_tokens=8)
    assert (len(workload.requests), workload.images) == (4, 2)
    for request, mask in zip(workload.requests, [mask for one in found for mask in one.masks], strict=True):
        assert np.array_equal(request.parsed_regions()[0].mask(60, 40), mask)
    first = tuple(each_region(open_source(folder / "masks.jsonl").records()))[:3]
    parcel = Preparer(Preparation(str(mini)))(Bundle(first, (True,) * 3))
    assert parcel.regions == {number: [encoded(mask)] for number, mask in enumerate(found[0].masks)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("5", "line: "),
        ({"image": "images/turned.png"}, "regions: Field required"),
        ({"regions": [[1, 1, 9, 9]]}, "image: Field required"),
        ({"image": "images/turned.png", "regions": []}, "regions: expected at least one, got none"),
        ({"image": "images/none.png", "regions": [[1, 1, 9, 9]]}, r".*none\.png: no such file"),
        ({"image": "values.png", "regions": [[1, 1, 9, 9], {"mask": "none.png"}]}, r"regions\[1\]: mask: .*none\.png"),
        ({"image": "values.png", "regions": [{"box": [1, 1, 90, 9]}]}, r"regions\[0\]: box"),
        ({"image": "http://localhost/a.png", "regions": [[1, 1, 9, 9]]}, "image: expected a path or a data URL"),
    ],
)
def test_what_cannot_be_used_is_named_by_file_and_line(folder: Path, line: Any, message: str) -> None:
    good = {"image": "images/turned.png", "regions": [[1, 1, 9, 9]]}
    path = write_lines(folder / "bad.jsonl", [good, "", line])
    with pytest.raises(InputError, match=rf"^{path}: line 3: {message}"):
        real_workload(path, max_tokens=8)


@pytest.mark.parametrize(
    ("text", "message"), [("", "empty"), ("\n \n", "expected lines .* got none"), (None, "no such file")]
)
def test_a_file_without_a_line_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "masks.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=f"masks.jsonl: {message}"):
        real_workload(path, max_tokens=8)


def test_throughput_of_real_masks(folder: Path, mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    arguments = ["bench", "throughput", "-c", str(mini), "--backend", "reference", "--max-tokens", "2", "--json"]
    done = runner.invoke(app, [*arguments, "--regions", str(folder / "masks.jsonl")])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert "masks.jsonl, one by one" in document["conditions"]
    assert "2 images, 4 requests" in document["conditions"]
