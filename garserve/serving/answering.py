"""From a request's body to an answer: reading it, giving up when the client does, and ending in time."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from vllm.exceptions import GracefulHTTPError, RetryableRequestError, VLLMClientError
from vllm.v1.engine.exceptions import EngineDeadError

from garserve.errors import InputError, first_line
from garserve.serving import metrics
from garserve.serving.decoding import CutOffError
from garserve.serving.errors import APIError, cut_off, engine_dead, from_input, from_validation, internal, not_admitted
from garserve.serving.logs import logger
from garserve.serving.service import note, request_id

_T = TypeVar("_T")
_Model = TypeVar("_Model", bound=BaseModel)

DONE = "data: [DONE]\n\n"


async def read_body(request: Request, model: type[_Model]) -> _Model:
    """Return the JSON body as a model. Raises APIError: 415 for another type, 400 for what the model refuses."""
    # Also where none is said: that is what a page of any site can send to a server on the machine of its reader, while
    # for JSON's type browsers ask the server first.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        got = f"{kind!r:.60}" if kind else "none"
        raise APIError(415, f"content-type: expected application/json, got {got}", code="content_type")
    return await asyncio.to_thread(parsed, await request.body(), model)


def parsed(body: bytes, model: type[_Model]) -> _Model:
    """Return JSON as a model. Raises APIError (400) naming the field, in time and memory that the body bounds."""
    # First to Python's objects: pydantic's own of JSON are several times as large, and it copies each into complaints.
    try:
        data = from_json(body)
    except ValueError as error:
        raise APIError(400, f"body: {first_line(error)[:300]}", code="invalid_json") from None
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise from_validation(error) from None


def as_api_error(error: Exception, request: Request) -> APIError:
    """Return any exception of a request's work as the answer that it gets; the log has what the client may not see."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, InputError):
        return from_input(error)
    if isinstance(error, CutOffError):
        return cut_off()
    if isinstance(error, RetryableRequestError | EngineDeadError):
        return engine_dead()
    if isinstance(error, GracefulHTTPError):
        return not_admitted(int(error.http_status), first_line(error)[:300])
    if isinstance(error, VLLMClientError):
        return APIError(400, first_line(error)[:300], param=getattr(error, "parameter", None))
    logger.error("request failed", exc_info=error, extra={"fields": {"request_id": request_id(request)}})
    return internal()


async def attended(request: Request, work: Coroutine[Any, Any, _T], deadline: float | None) -> _T:
    """Wait for work while the client does. Raises APIError: 499 when it has gone, 504 when the time is over.

    The body must have been read. The work is cancelled in both cases, and its end awaited.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        left = None if deadline is None else max(deadline - asyncio.get_running_loop().time(), 0.0)
        await asyncio.wait({task, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            metrics.disconnected.inc()
            note(request, disconnected=True)
            raise APIError(499, "the client has gone", code="disconnected")
        raise timed_out()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def timed_out() -> APIError:
    """A 504 for an answer that was not there in time."""
    return APIError(504, "the answer was not there in the time that this server gives it", code="timeout")


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(data: Any) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def deadline_in(seconds: float) -> float | None:
    """Return the event loop's time in so many seconds; None for 0, which is no limit."""
    return asyncio.get_running_loop().time() + seconds if seconds else None


def stream_response(
    request: Request,
    events: AsyncIterator[str],
    deadline: float | None,
    *,
    on_end: Callable[[], Awaitable[None]] | None = None,
) -> StreamingResponse:
    """Answer with events; an error on the way is the last one before [DONE], since the status has been sent.

    `on_end` is awaited when the answer has ended, also where no event was ever asked for: a generator that has not
    begun cleans up nothing.
    """
    return _ClosingResponse(_guarded(request, events, deadline), on_end)


class _ClosingResponse(StreamingResponse):
    """Ends its events' work when it ends, also where an answer could not be sent, instead of when memory is tidied."""

    body_iterator: AsyncGenerator[str]

    def __init__(self, events: AsyncGenerator[str], on_end: Callable[[], Awaitable[None]] | None) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await self.body_iterator.aclose()
            finally:
                if self._on_end is not None:
                    await self._on_end()


async def _guarded(request: Request, events: Any, deadline: float | None) -> AsyncGenerator[str]:
    try:
        async with aclosing(events) as source:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        piece = await anext(source)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    yield event(timed_out().body())
                    yield DONE
                    return
                except Exception as error:  # whatever it was, the client is told, and the log knows
                    yield event(as_api_error(error, request).body())
                    yield DONE
                    return
                yield piece
    except (asyncio.CancelledError, GeneratorExit):
        metrics.disconnected.inc()
        note(request, disconnected=True)
        raise
