"""How clients of a garserve server read what comes back (floor 4)."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from garserve.errors import GarserveError

if TYPE_CHECKING:
    import httpx

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
