"""What every request passes first: an id, the key, room in the queue, and a body that is small and comes in time."""

import asyncio
import hashlib
import re
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

from starlette._utils import get_route_path  # what routes are found by: the gate must see the same path
from starlette.datastructures import Headers, MutableHeaders

from garserve.serving import metrics
from garserve.serving.admission import Admission
from garserve.serving.errors import APIError, internal, too_large
from garserve.serving.logs import logger
from garserve.serving.settings import Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = ("/", "/health", "/ready", "/openapi.json", "/favicon.ico")  # and all of /page/: nothing that needs a key
_QUIET = ("/health", "/ready", "/metrics")
_LINGER_SECONDS = 0.3
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


class _StalledError(Exception):
    """A client that does not take its answer."""


class Keys:
    """Compares keys by their hashes, in a time that tells nothing about them."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, headers: Headers) -> None:
        """Raise a 401 unless a key is needed and given, as `Authorization: Bearer KEY`."""
        if not self._hashes:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        hashed = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        good = False
        for known in self._hashes:
            good |= secrets.compare_digest(hashed, known)
        if not (good and scheme.lower() == "bearer"):
            metrics.rejected.labels("key").inc()
            message = "expected a key of this server as Authorization: Bearer KEY"
            raise APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


class Gate:
    """ASGI middleware; `admission` is told of every request that means work."""

    def __init__(self, app: App, *, settings: Settings, admission: Admission) -> None:
        self._app, self._settings, self._admission = app, settings, admission
        self._keys = Keys(settings.api_keys)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error; log it either way."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None  # no websockets here; the server closes the connection
        passage = _Passage(scope, receive, send, self._settings)
        try:
            await self._pass(scope, passage)
        except APIError as error:
            await passage.refuse(error)
        except _StalledError:
            passage.count_as_gone()
        except Exception as error:  # nothing of the inside goes out
            logger.error("request failed", exc_info=error, extra={"fields": {"request_id": passage.id}})
            await passage.refuse(internal())
        finally:
            passage.log()
        return None

    async def _pass(self, scope: MutableMapping[str, Any], passage: "_Passage") -> None:
        if passage.path not in OPEN and not passage.path.startswith("/page/"):
            self._keys.check(passage.headers)
        work = scope["method"] == "POST"
        if work:
            self._admission.enter()
        try:
            passage.check_length()
            await self._app(scope, passage.receive, passage.send)
        finally:
            if work:
                self._admission.leave()


class _Passage:
    """One request on its way through."""

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send, settings: Settings) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.path = get_route_path(scope)  # without --root-path; asked now, for a mount changes what is the root
        self._most, self._seconds = settings.max_body_bytes, settings.body_seconds
        self._send_seconds = settings.send_seconds
        self.headers = Headers(scope=scope)
        given = self.headers.get("x-request-id", "")
        self.id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope["garserve.request_id"] = self.id
        self._facts: dict[str, Any] = scope.setdefault("garserve.facts", {})
        self._started = time.perf_counter()
        self._status: int | None = None
        self._taken = 0
        self._whole = False

    def check_length(self) -> None:
        """Raise a 413 for a body that says that it is too large, before any of it is read."""
        length = self.headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > self._most:
            raise self._too_large()

    def _too_large(self) -> APIError:
        metrics.rejected.labels("body").inc()
        error = too_large(f"body: more than {self._most} bytes")
        error.headers["Connection"] = "close"
        return error

    async def receive(self) -> Message:
        """Take a piece of the body, or the news that the client has gone."""
        if self._whole:
            return await self._receive()
        left = self._started + self._seconds - time.perf_counter()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0))
        except TimeoutError:
            metrics.rejected.labels("slow").inc()
            raise APIError(
                408,
                f"body: not there within {self._seconds:g} seconds",
                code="slow_body",
                headers={"Connection": "close"},
            ) from None
        if message["type"] == "http.request":
            self._taken += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._taken > self._most:
                raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        """Pass an answer on, with the request's id and without sniffing; _StalledError where nobody takes it."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.id
            headers["X-Content-Type-Options"] = "nosniff"
        try:
            await asyncio.wait_for(self._send(message), self._send_seconds)
        except TimeoutError:
            self._facts["stalled"] = True
            raise _StalledError from None

    def count_as_gone(self) -> None:
        """Count the client among those that went away, unless its answer's events have, when they were ended."""
        if not self._facts.get("disconnected"):
            metrics.disconnected.inc()
            self._facts["disconnected"] = True

    async def refuse(self, error: APIError) -> None:
        """Answer with an error, unless an answer has begun: then nothing can be said any more."""
        if self._status is None:
            if error.status == 413 and "expect" not in self.headers:
                await self._linger()
            await error.response()(self._scope, self._receive, self.send)

    async def _linger(self) -> None:
        """Read on for a moment: a client that is cut off while it sends would not see the answer."""
        taken = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while not self._whole and taken < self._most:
                    message = await self._receive()
                    taken += len(message.get("body", b""))
                    self._whole = not message.get("more_body", False)

    def log(self) -> None:
        """Write the request's line. Probes and scrapes are not worth one while they go well."""
        if self.path in _QUIET and self._status is not None and self._status < 400:
            return
        client = self._scope.get("client")
        fields = {
            "request_id": self.id,
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": self._status,
            "ms": round(1000 * (time.perf_counter() - self._started), 1),
            "body_bytes": self._taken,
            "client": client[0] if client else None,
            **self._facts,
        }
        logger.info("request", extra={"fields": fields})
