"""Images from outside, to upright 8-bit RGB arrays. Regions are given in this upright frame."""

import base64
import binascii
import io
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from garserve.errors import ImageError

ImageSource = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]

_Read = TypeVar("_Read")

# Pixels of width x height above which a file is refused before it is decoded.
MAX_PIXELS = 150_000_000
# Pixels of a side: torch's resize holds every row of an image at the width of its tiles, 5 kB for one of 448.
MAX_SIDE = 65_535

# What is opened at all: Pillow also knows formats that run other programs, or that nobody keeps photographs in.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "PPM")

# Pillow decodes a picture when it is first looked at, and not in two threads at a time.
_LOCKS = tuple(Lock() for _ in range(64))

_BACKGROUND = (255, 255, 255)  # transparent pixels are laid on white, as vLLM lays them


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read an image as RGB uint8 [H, W, 3], upright by its EXIF orientation.

    `source` is a path, the bytes of a file, a `data:` URL, a PIL image, or an array [H, W], [H, W, 3] or [H, W, 4]
    of uint8, uint16 or bool. Palettes, alpha (on white), 16 bits a channel and CMYK are converted.
    Raises ImageError naming the source when it cannot be read, is no image, or has more than `max_pixels` pixels or
    a side of more than MAX_SIDE.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _guarded("image", lambda: _to_rgb(source, "image", max_pixels))
    file, name = _open_bytes(source)
    with file:
        return _guarded(name, lambda: _to_rgb(open_picture(file, name, max_pixels), name, max_pixels))


def hold_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read an image once for several requests: RGB uint8 [H, W, 3], read-only memory of its own.

    Later requests know such an array again without hashing its pixels. Raises ImageError, as load_image does.
    """
    image = load_image(source, max_pixels=max_pixels)
    if image.flags.writeable or image.base is not None:
        if image is source or image.base is not None:
            image = image.copy()
        image.setflags(write=False)
    return image


def load_mask(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as it is, for use as a mask: no conversion, no orientation. Raises ImageError."""
    file, name = _open_bytes(path)
    with file:
        return _guarded(name, lambda: decoded(open_picture(file, name, max_pixels)))


def load_with_alpha(
    source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS
) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """Read an image whose alpha channel marks something: RGB uint8 [H, W, 3] as it lies below it, and bool [H, W].

    The mask is what is not fully transparent; None where nothing is fully transparent: as in masks, a soft edge or one
    pixel that is not quite opaque marks nothing. Then the image is what `load_image` returns. Both are upright.
    Raises ImageError as `load_image` does.
    """
    file, name = _open_bytes(source)
    with file:
        return _guarded(name, lambda: _split_alpha(open_picture(file, name, max_pixels), name, max_pixels))


def _split_alpha(image: Image.Image, name: str, max_pixels: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    upright = _upright(image)
    if "A" not in upright.getbands() and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    if "A" not in upright.getbands() or upright.getchannel("A").getextrema()[0] != 0:
        return _to_rgb(upright, name, max_pixels), None
    alpha = np.asarray(upright.getchannel("A"), dtype=np.uint8) != 0
    return np.array(upright.convert("RGBA").convert("RGB"), dtype=np.uint8), alpha


def open_picture(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """Open an image file of a usual format, its pixels not decoded yet; ImageError where it is too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(file, formats=FORMATS)
    _check_size(image, name, max_pixels)
    return image


def image_pixels(source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS) -> int:
    """Return how many pixels an image file has, by its header alone. Raises ImageError, as load_image does."""
    file, name = _open_bytes(source)
    with file:
        width, height = _guarded(name, lambda: open_picture(file, name, max_pixels).size)
    return width * height


def decoded(image: Image.Image) -> Image.Image:
    """Return a PIL image with its pixels decoded, also where several threads ask for those of the same one."""
    with _LOCKS[(id(image) >> 6) % len(_LOCKS)]:
        image.load()
    return image


def _guarded(name: str, read: Callable[[], _Read]) -> _Read:
    try:
        return read()
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: too many pixels; refused before decoding") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image (expected one of {', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise whatever their parsers stumble over
        raise ImageError(f"{name}: broken or truncated image ({type(error).__name__}: {error})") from None


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width}x{height} pixels; refused, more than {max_pixels} pixels")
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{name}: {width}x{height} pixels; refused, a side of more than {MAX_SIDE} pixels")
    if width == 0 or height == 0:
        raise ImageError(f"{name}: {width}x{height} pixels; expected at least one")


def _open_bytes(source: str | os.PathLike[str] | bytes) -> tuple[BinaryIO, str]:
    if isinstance(source, bytes):
        if not source:
            raise ImageError("image bytes: empty")
        return io.BytesIO(source), "image bytes"
    if isinstance(source, str) and source.startswith("data:"):
        header, _, payload = source.partition(",")
        if not header.endswith(";base64"):
            raise ImageError(f"image data URL: expected base64 data, got {header[:60]!r}")
        try:
            return io.BytesIO(base64.b64decode(payload, validate=True)), "image data URL"
        except (binascii.Error, ValueError) as error:
            raise ImageError(f"image data URL: not base64 ({error})") from None
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise ImageError(f"{path}: cannot be read (not a regular file)")
            return path.open("rb"), str(path)
        except FileNotFoundError:
            raise ImageError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise ImageError(
                f"{str(path)[:200]}: cannot be read ({getattr(error, 'strerror', None) or error})"
            ) from None
    raise ImageError(f"image: expected a path, bytes, data URL, PIL image or array, got {type(source).__name__}")


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> NDArray[np.uint8]:
    _check_size(image, name, max_pixels)
    image = _upright(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = _from_wide(image, name)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, _BACKGROUND)
        canvas.alpha_composite(image)
        image = canvas
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF data say; data that cannot be read say nothing. It stays known what format it had."""
    decoded(image)
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # Pillow's reader of EXIF raises whatever it stumbles over
        return image
    upright.format = image.format
    return upright


def _from_wide(image: Image.Image, name: str) -> Image.Image:
    """32-bit grey holds 16 bits; anything outside 0..65535 has no defined white, and 8 bits would become black.

    A 16-bit PGM has mode I, too, but its header says how many bits it has, so it may be as dark as it likes.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" or low < 0 or high > 65535:
        raise ImageError(f"{name}: mode {image.mode} with values {low:g}..{high:g}; expected 8 or 16 bits a channel")
    if 0 < high < 256 and image.format != "PPM":
        raise ImageError(f"{name}: mode I with values up to {high:g}; expected 16 bits; convert 8 bits to mode L")
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


def _from_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise ImageError(f"image array: expected shape [H, W], [H, W, 3] or [H, W, 4], got {list(array.shape)}")
    if max(array.shape) > MAX_SIDE:
        raise ImageError(f"image array: expected sides of at most {MAX_SIDE} pixels, got {list(array.shape)}")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype != np.uint8:
        raise ImageError(f"image array: expected uint8, uint16 or bool, got {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 3:
        return np.ascontiguousarray(array)
    return _to_rgb(Image.fromarray(array), "image array", MAX_PIXELS)
