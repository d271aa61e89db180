"""What clients of a garserve server send, and how they read what comes back (floor 4)."""

import base64
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from garserve.errors import GarserveError, RegionError
from garserve.inputs.regions import Region
from garserve.inputs.shapes import BoxShape, MaskShape, PolygonShape, RLEShape, StrokeShape

if TYPE_CHECKING:
    import httpx

_DONE = "[DONE]"


class ServerError(GarserveError):
    """The server's refusal: its status, and the code, the field and the words of its error."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(f"{status}: {error.get('message', 'no message')}")
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
    """Return an image as the server takes it: a URL as it is; a path, bytes, a PIL image or an array as a data URL."""
    if isinstance(image, str) and image.split(":", 1)[0] in ("data", "http", "https", "file"):
        return image
    if isinstance(image, str | os.PathLike):
        image = Path(image).read_bytes()
    if not isinstance(image, bytes):
        image = _png(image)
    return "data:application/octet-stream;base64," + base64.b64encode(image).decode()


def region_json(region: Any) -> Any:
    """Return a region as the server takes it: JSON as it is, a Region, a mask array or a PIL image as JSON.

    Raises RegionError for what has no such form, and for a mask that is a file which cannot be read.
    """
    if isinstance(region, dict):
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
        mask = shape._array()
        return {"mask": "data:image/png;base64," + base64.b64encode(_png(mask)).decode()}
    raise RegionError(f"region: {type(shape).__name__} cannot be sent")


def _png(image: Any) -> bytes:
    import numpy as np
    from PIL import Image

    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    file = io.BytesIO()
    picture.save(file, "PNG")
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


def event(line: str) -> dict[str, Any] | None:
    """Return the data of one line of a stream, None for other lines. Raises ServerError for an error."""
    if not line.startswith("data: ") or line[6:] == _DONE:
        return None
    data: dict[str, Any] = json.loads(line[6:])
    if "error" in data and "index" not in data:
        code = data["error"].get("code")
        raise ServerError(code if isinstance(code, int) else 503, data["error"])
    return data


def delta(event: dict[str, Any] | None) -> str:
    """Return the text that a chat's event adds."""
    return event["choices"][0]["delta"].get("content") or "" if event and event.get("choices") else ""


def region_text(event: dict[str, Any]) -> RegionText:
    """Return a description's event, or its item of a whole answer."""
    return RegionText(**{name: event[name] for name in RegionText.__dataclass_fields__ if name in event})
