"""What clients of a garserve server send, and how they read what comes back (floor 4)."""

import base64
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from garserve.errors import GarserveError, ImageError, RegionError
from garserve.inputs.images import load_image
from garserve.inputs.regions import Region
from garserve.inputs.shapes import BoxShape, MaskShape, PolygonShape, RLEShape, StrokeShape

if TYPE_CHECKING:
    import httpx
    from numpy.typing import NDArray

_DATA, _DONE = b"data: ", b"[DONE]"
_STATUSES = {"timeout": 504, "internal_error": 500}  # of errors in a stream, whose own status has been sent


class ServerError(GarserveError):
    """The server's refusal: its status, and the code, the field and the words of its error.

    `status` is None where no answer came, or not the whole of one: nobody listens, or the connection broke.
    """

    def __init__(self, status: int | None, error: dict[str, Any]) -> None:
        super().__init__(f"{'no answer' if status is None else status}: {error.get('message', 'no message')}")
        self.status, self.code, self.param = status, error.get("code"), error.get("param")


@dataclass(frozen=True)
class RegionText:
    """What was said about one region; `error` where nothing could be."""

    index: int
    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: dict[str, Any] | None = None


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
    JSON, masks as PNG data URLs.

    Raises RegionError for what has no such form, and for a mask that is a file which cannot be read.
    """
    if isinstance(region, dict) and ("mask" not in region or str(region["mask"]).startswith("data:")):
        return region
    shape = Region.parse(region).shape
    if isinstance(shape, BoxShape):
        return {"box": list(shape.box), "clip": shape.clip}
    if isinstance(shape, PolygonShape):
        return {"polygon": [list(ring) for ring in shape.polygons]}
    if isinstance(shape, RLEShape):
        counts = shape.rle["counts"]
        return {"rle": {**shape.rle, "counts": counts.decode() if isinstance(counts, bytes) else counts}}
    if isinstance(shape, StrokeShape):
        points = [list(point) for point in shape.points]
        size = {"width": 2 * shape.radius} if shape.joined else {"radius": shape.radius}
        return {"scribble" if shape.joined else "points": points, **size}
    if isinstance(shape, MaskShape):
        mask = shape.array()
        return {"mask": "data:image/png;base64," + base64.b64encode(_png(mask)).decode()}
    raise RegionError(f"region: {type(shape).__name__} cannot be sent")


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
        """Connect to a server; without `api_key`, GARSERVE_API_KEY is used where it is set. `timeout` is in seconds."""
        key = api_key or os.environ.get("GARSERVE_API_KEY")
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


def checked(response: "httpx.Response", body: bytes) -> Any:
    """Return the JSON of an answer. Raises ServerError where it is not a 200."""
    try:
        data = json.loads(body)
    except ValueError:
        data = {"error": {"message": f"not JSON: {body[:80]!r}"}}
    if response.status_code != 200:
        error = data.get("error") if isinstance(data, dict) else None
        raise ServerError(response.status_code, error if isinstance(error, dict) else {"message": str(data)[:200]})
    return data


@contextmanager
def answered() -> Iterator[None]:
    """Make every failure of the connection a ServerError without a status."""
    import httpx

    try:
        yield
    except httpx.RequestError as error:
        raise ServerError(None, {"message": f"{type(error).__name__}: {error}"}) from error


class Events:
    """The events of a stream from its bytes, as they come. Lines end with a line feed: texts may hold other ends."""

    def __init__(self) -> None:
        self._rest, self._ended = b"", False

    def read(self, piece: bytes) -> Iterator[dict[str, Any]]:
        """Yield the data of each event that is whole now. Raises ServerError for an error."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(_DATA):
                continue
            if line[len(_DATA) :].strip() == _DONE:
                self._ended = True
                return
            data: dict[str, Any] = json.loads(line[len(_DATA) :])
            if "error" in data and "index" not in data:
                code = data["error"].get("code")
                raise ServerError(code if isinstance(code, int) else _STATUSES.get(code, 503), data["error"])
            yield data

    def end(self) -> None:
        """Raise ServerError where the stream ended before its answer did."""
        if not self._ended:
            raise ServerError(None, {"message": "the connection ended before the answer did", "code": "incomplete"})


def delta(event: dict[str, Any]) -> str:
    """Return the text that a chat's event adds."""
    return event["choices"][0]["delta"].get("content") or "" if event.get("choices") else ""


def region_text(event: dict[str, Any]) -> RegionText:
    """Return a description's event, or its item of a whole answer."""
    return RegionText(**{name: event[name] for name in RegionText.__dataclass_fields__ if name in event})
