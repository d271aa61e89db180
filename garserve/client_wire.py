"""What clients of a garserve server send (floor 4)."""

import base64
import io
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from garserve.errors import ImageError, RegionError, RequestError
from garserve.inputs.images import load_image
from garserve.inputs.regions import Region
from garserve.inputs.shapes import BoxShape, MaskShape, PolygonShape, RLEShape, Shape, StrokeShape

if TYPE_CHECKING:
    from numpy.typing import NDArray


_PNG = "data:image/png;base64,"


def image_url(image: Any) -> str:
    """Return an image as the server takes it: a URL as it is; a path, bytes, a PIL image or an array as a data URL.

    A PIL image or an array is sent as a PNG of what `load_image` makes of it: upright, 8-bit RGB.
    Raises ImageError where it cannot be read.
    """
    if isinstance(image, str) and image.split(":", 1)[0] in ("data", "http", "https", "file"):
        return image
    if isinstance(image, str | os.PathLike):
        try:
            image = Path(image).read_bytes()
        except (OSError, ValueError) as error:
            raise ImageError(f"{image}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(image, bytes):
        image = _png(load_image(image))
    return "data:application/octet-stream;base64," + base64.b64encode(image).decode()


def region_json(region: Any) -> Any:
    """Return a region as the server takes it: JSON as it is; a Region, a mask array, a PIL image or a mask's path as
    JSON, masks as PNG data URLs. NumPy's numbers and arrays become JSON's, and bytes (pycocotools' counts) text.

    Raises RegionError for what has no such form, and for a mask that is a file or a data URL which cannot be read.
    """
    if isinstance(region, dict) and ("mask" not in region or _is_sent_mask(region)):
        with suppress(TypeError, ValueError):  # else Region.parse takes it, or says what is wrong with it
            return _plain(region)
    shape = Region.parse(region).shape
    sent = _fields(shape)
    try:
        return _plain(sent)
    except (TypeError, ValueError):
        raise RegionError(f"{shape.kind}: expected finite numbers, lists and text, got {sent!r:.80}") from None


def _is_sent_mask(region: dict[str, Any]) -> bool:
    """Say whether a mask is in the one form that the server takes; of another picture, or with a value, it is drawn."""
    return set(region) == {"mask"} and isinstance(region["mask"], str) and region["mask"].startswith(_PNG)


def _fields(shape: Shape) -> dict[str, Any]:
    if isinstance(shape, BoxShape):
        return {"box": shape.box, "clip": shape.clip}
    if isinstance(shape, PolygonShape):
        return {"polygon": shape.polygons}
    if isinstance(shape, RLEShape):
        return {"rle": shape.rle}
    if isinstance(shape, StrokeShape):
        size = {"width": 2 * shape.radius} if shape.joined else {"radius": shape.radius}
        return {"scribble" if shape.joined else "points": shape.points, **size}
    if isinstance(shape, MaskShape):
        return {"mask": _PNG + base64.b64encode(_png(shape.array())).decode()}
    raise RegionError(f"region: {type(shape).__name__} cannot be sent")


def _plain(value: Any) -> Any:
    """Return a value in JSON's own types. TypeError or ValueError where it holds what has no such form."""
    return json.loads(json.dumps(value, default=_as_json, allow_nan=False))


def _as_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("ascii")
    if not hasattr(value, "tolist"):
        raise TypeError(f"{type(value).__name__} is not of JSON")
    return value.tolist()


def _png(image: "NDArray[Any]") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


class Requests:
    """The bodies of both clients' requests."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout: float = 300.0,
    ) -> None:
        """Connect to a server; without `api_key`, GARSERVE_API_KEY is used where it is set. `timeout` is in seconds.

        Spaces and line ends around a key are no part of it. Raises RequestError for a key that no HTTP header can hold.
        """
        key = (api_key or "").strip() or os.environ.get("GARSERVE_API_KEY", "").strip()
        wrong = [place for place, letter in enumerate(key) if not (letter.isascii() and letter.isprintable())]
        if wrong:  # said here and without the key: what httpx says of it ends up in logs
            raise RequestError(f"api_key: expected printable ASCII characters, got another at position {wrong[0]}")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._model = model
        self._http: Any = self._open(base_url=url.rstrip("/"), headers=headers, timeout=timeout)

    def _open(self, **options: Any) -> Any:
        raise NotImplementedError

    def _describe(self, image: Any, regions: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
        model = {} if self._model is None else {"model": self._model}
        return {"image": image_url(image), "regions": [region_json(region) for region in regions], **model, **options}

    def _ask(self, image: Any, regions: Sequence[Any], question: str | None, options: dict[str, Any]) -> dict[str, Any]:
        turns = options.pop("turns", ())
        content: list[dict[str, Any]] = [
            {
                "type": "image_url",
                "image_url": {"url": image_url(image)},
                "regions": [region_json(region) for region in regions],
            }
        ]
        if question is not None:
            content.append({"type": "text", "text": question})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if (system := options.pop("system", None)) is not None:
            messages.insert(0, {"role": "system", "content": system})
        messages += [{"role": role, "content": text} for role, text in turns]
        model = {} if self._model is None else {"model": self._model}
        return {"messages": messages, **model, **options}
