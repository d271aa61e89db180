"""What of a picture is inside, where it is given as a mask (floor 2; for `shapes.py`)."""

import os
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from garserve.errors import RegionError

# Formats whose compression leaves noise around shapes (MPO is several JPEGs in a file), and what is inside there.
# WebP is such a format, or is none: each file says for itself.
_LOSSY, _HALF = ("JPEG", "MPO", "AVIF"), 128
# Of 255: by so much the bands of a grey picture may differ after lossy compression, which holds no red, green and blue.
_BAND_NOISE = 4


def picture_labels(picture: Image.Image) -> NDArray[np.generic]:
    """Return a picture's values [H, W], a palette's indices; RegionError where it has none, or none that are exact."""
    if len(picture.getbands()) > 1:
        raise RegionError(f"mask: value: expected a grey or palette picture, got mode {picture.mode}")
    if picture.format in _LOSSY:
        raise RegionError(f"mask: value: expected a format that keeps values, such as PNG, got {picture.format}")
    return np.asarray(picture)


def picture_mask(picture: Image.Image, path: str | os.PathLike[str] = "") -> NDArray[np.bool_]:
    """Return what of a decoded picture is inside, bool [H, W].

    That is what is not fully transparent, where something is; or not 0, or in a format with losses 128 and more. `path`
    is the file that it came from, if any: of a WebP it says whether there were losses. Without it, bands that hardly
    differ do. Raises RegionError for a coloured picture, and a lossy one that is dark everywhere.
    """
    if picture.mode == "P" and (marked := _mask_of_palette(picture)) is not None:
        return marked
    name, lossy = picture.format, _is_lossy(picture, path)
    if picture.mode in ("RGBA", "LA", "PA"):
        if (marked := _mask_of_alpha(picture)) is not None:
            return marked
        picture = picture.convert("RGB")
    array = np.asarray(picture)
    if array.ndim == 3:
        differ = int((array.max(axis=2) - array.min(axis=2)).max())
        if differ > (0 if lossy is False else _BAND_NOISE):
            raise RegionError("mask: expected a grey, black-and-white or palette picture, got a coloured one")
        lossy = differ > 0 if lossy is None else lossy
        array = array[..., 0]
    if lossy and 0 < array.max() < _HALF:
        raise RegionError(
            f"mask: expected {_HALF} and more inside, for {name} leaves noise around shapes, "
            f"got at most {array.max()}; PNG keeps values"
        )
    return np.asarray(array >= _HALF if lossy else array != 0)


def _is_lossy(picture: Image.Image, path: str | os.PathLike[str]) -> bool | None:
    """Whether compression changed a picture's values; None where nothing but the values can tell."""
    if picture.format != "WEBP":
        return picture.format in _LOSSY
    try:
        with open(path, "rb") as file:
            return _is_lossy_webp(file)
    except (OSError, ValueError):  # it came from memory, a `data:` URL, or a file that is gone
        return None


def _is_lossy_webp(file: BinaryIO) -> bool | None:
    """Whether a WebP's first frame was compressed with losses; None where the file has none, and so is another by now.

    Of its chunks, `VP8 ` holds a lossy picture and `VP8L` a lossless one; those of an animation lie inside `ANMF`
    (RFC 9649, section 2).
    """
    file.seek(12)
    while len(head := file.read(8)) == 8:
        name, size = head[:4], int.from_bytes(head[4:], "little")
        if name in (b"VP8 ", b"VP8L"):
            return name == b"VP8 "
        file.seek(16 if name == b"ANMF" else size + size % 2, os.SEEK_CUR)
    return None


def _mask_of_alpha(image: Image.Image) -> NDArray[np.bool_] | None:
    """What is not fully transparent; None where nothing is, so that alpha marks nothing."""
    alpha = np.asarray(image.getchannel("A"))
    return np.asarray(alpha != 0) if (alpha == 0).any() else None


def _mask_of_palette(image: Image.Image) -> NDArray[np.bool_] | None:
    """What is not fully transparent, or not black; None where index 0 is outside, as in pictures of labels.

    A palette may have its colours in any order: it was made to hold them, not to say what is inside.
    """
    if "transparency" in image.info and (marked := _mask_of_alpha(image.convert("RGBA"))) is not None:
        return marked
    colours = np.asarray(image.getpalette("RGB") or (), dtype=np.uint8).reshape(-1, 3)
    black = np.flatnonzero(~colours.any(axis=1))
    outside = np.isin(np.asarray(image), black)
    return ~outside if len(colours) and colours[0].any() and outside.any() else None
