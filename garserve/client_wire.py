"""What clients of a garserve server send, and how they read what comes back (floor 4)."""

import base64
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from garserve.errors import GarserveError, ImageError, RegionError, RequestError
from garserve.inputs.images import load_image
from garserve.inputs.regions import Region
from garserve.inputs.shapes import BoxShape, MaskShape, PolygonShape, RLEShape, Shape, StrokeShape

if TYPE_CHECKING:
    import httpx
    from numpy.typing import NDArray

_DATA, _DONE = b"data: ", b"[DONE]"
_STATUSES = {"timeout": 504, "internal_error": 500}  # of errors in a stream, whose own status has been sent


class ServerError(GarserveError):
    """The server's refusal: its status, and the code, the field and the words of its error.

    `status` is None where no answer came, or not the whole of one: nobody listens, or the connection broke. It is 200
    where something else than the answer came, as from a login page or a server that is no garserve.
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
    JSON, masks as PNG data URLs. NumPy's numbers and arrays become JSON's, and bytes (pycocotools' counts) text.

    Raises RegionError for what has no such form, and for a mask that is a file which cannot be read.
    """
    if isinstance(region, dict) and ("mask" not in region or str(region["mask"]).startswith("data:")):
        with suppress(TypeError, ValueError):  # else Region.parse takes it, or says what is wrong with it
            return _plain(region)
    shape = Region.parse(region).shape
    sent = _fields(shape)
    try:
        return _plain(sent)
    except (TypeError, ValueError):
        raise RegionError(f"{shape.kind}: expected finite numbers, lists and text, got {sent!r:.80}") from None


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
        return {"mask": "data:image/png;base64," + base64.b64encode(_png(shape.array())).decode()}
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


def checked(response: "httpx.Response", body: bytes) -> dict[str, Any]:
    """Return the JSON object of an answer. Raises ServerError where it is not a 200, or no JSON object."""
    data = _read(body)
    if response.status_code == 200 and isinstance(data, dict):
        return data
    error = data.get("error") if isinstance(data, dict) else None
    said = str(data)[:200] if isinstance(data, dict) else f"expected a JSON object, got {body[:80]!r}"
    raise ServerError(response.status_code, error if isinstance(error, dict) else {"message": said})


def is_stream(response: "httpx.Response") -> bool:
    """Say whether an answer is a stream of events; else `unstreamed` tells what it is."""
    kind = response.headers.get("Content-Type", "text/event-stream")
    return response.status_code == 200 and kind.startswith("text/event-stream")


def unstreamed(response: "httpx.Response", body: bytes) -> NoReturn:
    """Raise the ServerError of an answer that is no stream of events."""
    raise _unexpected("a stream of events", checked(response, body))


def _read(text: bytes) -> Any:
    """Return what JSON says, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _unexpected(wanted: str, found: Any) -> ServerError:
    return ServerError(200, {"message": f"expected {wanted}, got {found!r:.80}; is this a garserve server?"})


@contextmanager
def _expecting(wanted: str, found: Any) -> Iterator[None]:
    """Make a field that is missing in an answer, or of another kind, a ServerError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _unexpected(wanted, found) from None


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
        """Yield the data of each event that is whole now. Raises ServerError for an error, and for what is no JSON."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(_DATA):
                continue
            if line[len(_DATA) :].strip() == _DONE:
                self._ended = True
                return
            yield _event(line[len(_DATA) :])

    def end(self) -> None:
        """Raise ServerError where the stream ended before its answer did."""
        if not self._ended:
            raise ServerError(None, {"message": "the connection ended before the answer did", "code": "incomplete"})


def _event(text: bytes) -> dict[str, Any]:
    data = _read(text)
    if not isinstance(data, dict):
        raise _unexpected("a JSON object as event", text)
    if "error" in data and "index" not in data:
        error = data["error"] if isinstance(data["error"], dict) else {"message": str(data["error"])[:200]}
        code = error.get("code")
        raise ServerError(code if isinstance(code, int) else _STATUSES.get(str(code), 503), error)
    return data


def delta(event: dict[str, Any]) -> str:
    """Return the text that a chat's event adds. Raises ServerError where it is none of a chat's."""
    with _expecting("a chat's choices", event):
        return event["choices"][0]["delta"].get("content") or "" if event.get("choices") else ""


def answer_text(found: dict[str, Any]) -> str:
    """Return the text of a chat's whole answer. Raises ServerError where it has none."""
    with _expecting("a chat's choices", found):
        return str(found["choices"][0]["message"]["content"])


def region_texts(found: dict[str, Any]) -> list[RegionText]:
    """Return a whole answer's descriptions. Raises ServerError where it has none."""
    with _expecting("descriptions", found):
        return [region_text(item) for item in found["descriptions"]]


def region_text(event: dict[str, Any]) -> RegionText:
    """Return a description's event, or its item of a whole answer. Raises ServerError where it is none."""
    with _expecting("a region's description", event):
        return RegionText(**{name: event[name] for name in RegionText.__dataclass_fields__ if name in event})
