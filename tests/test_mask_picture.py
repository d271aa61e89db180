"""Pictures as masks: which formats leave noise around shapes, and what is inside then."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from garserve.errors import RegionError
from garserve.inputs.regions import Region

W, H = 131, 97
INSIDE = np.zeros((H, W), bool)
INSIDE[20:61, 13:77] = True
WHITE = Image.fromarray(INSIDE.astype(np.uint8) * 255)
FAINT = Image.fromarray(INSIDE.astype(np.uint8))
avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")


def drawn(source: Any) -> np.ndarray:
    return Region.from_mask(source).mask(H, W)


def saved(path: Path, picture: Image.Image, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def in_memory(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def noise(path: Path) -> int:
    """Count pixels that are not 0 and should be."""
    with Image.open(path) as picture:
        return int(((np.asarray(picture.convert("L")) != 0) & ~INSIDE).sum())


@pytest.mark.parametrize("quality", [30, 75, 95, 100])
@pytest.mark.parametrize("options", [{}, {"exif": b"Exif\0\0odd"}], ids=["plain", "extended"])
def test_noise_of_a_lossy_webp_is_outside(tmp_path: Path, quality: int, options: dict[str, bytes]) -> None:
    """At 95 and 100 its bands are alike, so that its file alone says what it is."""
    path = saved(tmp_path / "m.webp", WHITE, quality=quality, **options)
    assert noise(path) > 0
    for source in (path, str(path), Image.open(path)):
        assert (drawn(source) == INSIDE).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_lossy_webp_without_its_file_is_known_by_its_bands(tmp_path: Path, mode: str) -> None:
    path = saved(tmp_path / "m.webp", WHITE.convert(mode), quality=75)
    assert np.ptp(np.asarray(in_memory(path).convert("RGB")), axis=2).max() > 0
    assert (drawn(in_memory(path)) == INSIDE).all()
    picture = Image.open(path)
    picture.load()
    os.remove(path)
    assert (drawn(picture) == INSIDE).all()


def test_a_lossy_animation(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.webp", WHITE.convert("RGB"), save_all=True, append_images=[FAINT], quality=95)
    assert noise(path) > 0
    assert (drawn(path) == INSIDE).all()


@pytest.mark.parametrize("options", [{}, {"exif": b"Exif\0\0odd"}], ids=["plain", "extended"])
def test_a_lossless_webp_keeps_every_value(tmp_path: Path, options: dict[str, bytes]) -> None:
    path = saved(tmp_path / "m.webp", FAINT, lossless=True, **options)
    for source in (path, Image.open(path), in_memory(path)):
        assert (drawn(source) == INSIDE).all()
    coloured = np.dstack([INSIDE * 201, INSIDE * 200, INSIDE * 200]).astype(np.uint8)
    path = saved(tmp_path / "c.webp", Image.fromarray(coloured), lossless=True)
    with pytest.raises(RegionError, match="got a coloured one"):
        drawn(path)


@avif
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_noise_of_an_avif_is_outside(tmp_path: Path, mode: str) -> None:
    path = saved(tmp_path / "m.avif", WHITE.convert(mode), quality=50)
    assert noise(path) > 0
    for source in (path, Image.open(path), in_memory(path)):
        assert (drawn(source) == INSIDE).all()


@avif
def test_values_of_an_avif_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.avif", FAINT)
    with pytest.raises(RegionError, match=r"mask: expected 128 and more inside, for AVIF .* got at most 1; PNG"):
        drawn(path)
    with pytest.raises(RegionError, match="mask: value: expected a format that keeps values, such as PNG, got AVIF"):
        Region.from_mask(path, value=1).mask(H, W)


@pytest.mark.parametrize("name", ["m.jpg", "m.webp", pytest.param("m.avif", marks=avif)])
def test_what_a_lossy_format_cannot_say(tmp_path: Path, name: str) -> None:
    red = np.zeros((H, W, 3), np.uint8)
    red[INSIDE, 0] = 255
    with pytest.raises(RegionError, match="got a coloured one"):
        drawn(saved(tmp_path / name, Image.fromarray(red)))
    with pytest.raises(RegionError, match=r"mask: expected 128 and more inside, for .* got at most \d+; PNG keeps"):
        drawn(saved(tmp_path / name, Image.fromarray(INSIDE * np.uint8(100))))
    with pytest.raises(RegionError, match="mask: covers no pixel"):
        drawn(saved(tmp_path / name, Image.new("L", (W, H))))


def test_a_webp_whose_file_is_another_by_now(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.webp", WHITE, quality=75)
    picture = Image.open(path)
    picture.load()
    for content in (b"", b"RIFF\0\0\0\0WEBP" + b"\xff" * 40):
        path.write_bytes(content)
        assert (drawn(picture) == INSIDE).all()
