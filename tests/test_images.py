"""Images of every kind become upright 8-bit RGB; what is no image is refused by name."""

import base64
import contextlib
import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from garserve.errors import ImageError
from garserve.inputs.images import image_pixels, load_image, load_mask
from tests.conftest import PHOTO


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def tiff(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF")
    return buffer.getvalue()


@pytest.fixture
def colours() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_one_picture_by_every_road(colours: np.ndarray, tmp_path) -> None:
    data = png(Image.fromarray(colours))
    path = tmp_path / "a.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), data, url, Image.fromarray(colours), colours, colours.astype(np.uint16) * 257):
        loaded = load_image(source)
        assert loaded.dtype == np.uint8
        assert np.array_equal(loaded, colours)


def test_exif_data_that_cannot_be_read_say_nothing(colours: np.ndarray) -> None:
    for broken in (b"MM\x00*", b"XX\x00*\x00\x00\x00\x08\x00\x01"):
        assert np.array_equal(load_image(png(Image.fromarray(colours), exif=b"Exif\x00\x00" + broken)), colours)


def test_exif_orientation_is_applied(colours: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    assert np.array_equal(load_image(png(Image.fromarray(colours), exif=exif)), np.rot90(colours, -1))


def test_transparency_is_laid_on_white() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = (255, 0, 51)
    expected = [[[200, 0, 0], [255, 255, 255], [244, 204, 204]]]
    assert np.abs(load_image(Image.fromarray(rgba)).astype(int) - expected).max() <= 1
    assert np.abs(load_image(rgba).astype(int) - expected).max() <= 1


def test_palette_grey_bilevel_16_bit_and_cmyk(colours: np.ndarray) -> None:
    image = Image.fromarray(colours)
    assert np.array_equal(load_image(png(image.quantize(256))), np.asarray(image.quantize(256).convert("RGB")))
    grey = np.asarray(image.convert("L"))
    assert np.array_equal(load_image(png(image.convert("L"))), np.repeat(grey[..., None], 3, axis=2))
    bilevel = png(image.convert("1"))
    assert set(np.unique(load_image(bilevel))) <= {0, 255}
    deep = png(Image.fromarray(grey.astype(np.uint16) * 257))
    assert np.array_equal(load_image(deep), np.repeat(grey[..., None], 3, axis=2))
    buffer = io.BytesIO()
    Image.new("CMYK", (4, 3), (0, 255, 255, 0)).save(buffer, "JPEG")
    red = load_image(buffer.getvalue())
    assert red.shape == (3, 4, 3)
    assert red[0, 0, 0] > 200
    assert red[0, 0, 1] < 60


def test_wide_grey_files_are_as_dark_as_they_say() -> None:
    """A 16-bit PGM comes in Pillow's mode I, as a 32-bit TIFF does, but 200 is nearly black there."""
    dark = np.full((2, 4), 200, np.uint16)
    pgm = b"P5 4 2 65535\n" + dark.astype(">u2").tobytes()
    for source in (pgm, Image.open(io.BytesIO(pgm)), tiff(dark), tiff(np.zeros((2, 4), np.int32))):
        assert (load_image(source) == 0).all()
    bright = tiff(np.full((2, 4), 51_400, np.int32))
    assert (load_image(bright) == 200).all()


def test_palette_with_transparent_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert load_image(png(image, transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_tiny_and_very_wide_images() -> None:
    assert load_image(png(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]
    assert load_image(Image.new("RGB", (20000, 20))).shape == (20, 20000, 3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/a.png", "/nowhere/a.png: no such file"),
        (b"", "image bytes: empty"),
        (b"hello, this is a text", "not an image"),
        ("data:image/png,abc", "expected base64"),
        ("data:image/png;base64,@@@", "not base64"),
        ("data:image/png;base64,é", "not base64"),
        (PHOTO.read_bytes()[:5000], "truncated"),
        (png(Image.new("RGB", (64, 64), "red"))[:60], "truncated"),
        (np.zeros((4, 4, 2), np.uint8), r"expected shape .* got \[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), r"expected shape"),
        (np.zeros((4, 4, 3), np.float32), "expected uint8, uint16 or bool, got float32"),
        (np.zeros((65_536, 1, 3), np.uint8), r"sides of at most 65535 pixels, got \[65536, 1, 3\]"),
        (png(Image.new("1", (1, 65_536))), "1x65536 pixels; refused, a side of more than 65535"),
        (12, "expected a path, bytes, data URL, PIL image or array, got int"),
        ("a\0b.png", "cannot be read"),
        (Image.new("F", (2, 2), 0.5), "mode F"),
        (Image.new("I", (2, 2), 200), "mode I with values up to 200; expected 16 bits"),
        (tiff(np.full((4, 5), 200, np.int32)), "image bytes: mode I with values up to 200; expected 16 bits"),
        (Image.open(io.BytesIO(tiff(np.full((4, 5), 7, np.int32)))), "image: mode I with values up to 7; expected 16"),
    ],
)
def test_refused(source: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(source)  # type: ignore[arg-type]


def test_a_text_file_named_png(tmp_path) -> None:
    path = tmp_path / "text.png"
    path.write_text("no image")
    with pytest.raises(ImageError, match=r"text\.png: not an image"):
        load_image(path)


def test_a_folder_is_no_image(tmp_path) -> None:
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(tmp_path)


def test_devices_and_pipes_are_not_opened(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(ImageError, match="not a regular file"):
            load_image(path)
        with pytest.raises(ImageError, match="not a regular file"):
            load_mask(path)


def test_formats_that_nobody_keeps_photographs_in_are_not_opened() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    with pytest.raises(ImageError, match="not an image"):
        load_image(postscript)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"]))
def test_damaged_files_are_refused_or_read(seed: int, kind: str) -> None:
    """Whatever bytes are hit, Pillow's own errors do not get through."""
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(buffer, kind)
    data = bytearray(buffer.getvalue())
    for place in rng.integers(0, len(data), 4):
        data[place] = rng.integers(0, 256)
    with contextlib.suppress(ImageError):
        assert load_image(bytes(data[: len(data) - int(rng.integers(0, 9))]), max_pixels=10**6).dtype == np.uint8


def test_bombs_are_refused_before_decoding() -> None:
    bomb = png(Image.new("1", (40_000, 10_000)))
    assert len(bomb) < 100_000
    with pytest.raises(ImageError, match="refused"):
        load_image(bomb)
    with pytest.raises(ImageError, match="100x100 pixels; refused, more than 9999"):
        load_image(png(Image.new("1", (100, 100))), max_pixels=9999)


def test_several_threads_may_read_one_picture(colours: np.ndarray) -> None:
    file = png(Image.fromarray(np.repeat(np.repeat(colours, 40, 0), 40, 1)))
    expected = load_image(file)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            picture = Image.open(io.BytesIO(file))  # not decoded yet
            for found in pool.map(load_image, [picture] * 4):
                assert (found == expected).all()


def test_the_number_of_pixels_is_known_from_the_header() -> None:
    assert image_pixels(png(Image.new("RGB", (30, 20)))[:60]) == 600
    with pytest.raises(ImageError, match="30x20 pixels; refused, more than 599"):
        image_pixels(png(Image.new("RGB", (30, 20))), max_pixels=599)
    with pytest.raises(ImageError, match="not an image"):
        image_pixels(b"hello, this is a text")
