"""A server with the page and nothing of a model: it tells back what it was sent, in the forms of the real one."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse


def make_app(seen: list[dict[str, Any]], pace: float = 0.0) -> FastAPI:
    """Return an app that appends every body it gets to `seen`; `pace` seconds go by between two words."""
    from garserve.serving import page_routes, refine
    from garserve.serving.preparation import Preparer
    from garserve.serving.settings import Settings

    app, settings = FastAPI(), Settings()
    app.state.garserve = SimpleNamespace(settings=settings, preparer=Preparer(None, settings))  # no engine, no prompts
    app.include_router(page_routes.router)
    app.include_router(refine.router)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "echo", "object": "model", "prompts": 5}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> StreamingResponse | JSONResponse:
        body = await request.json()
        seen.append({"path": request.url.path, "key": request.headers.get("authorization"), **body})
        question = said(body["messages"][-1])
        if question == "401":
            return JSONResponse({"error": {"message": "Invalid API key", "code": 401}}, 401)
        if question == "429":
            return JSONResponse({"error": {"message": "Too many requests."}}, 429, headers={"Retry-After": "7"})
        return streamed(choices(f"You said: {question}", pace))

    @app.post("/v1/regions/describe")
    async def describe(request: Request) -> StreamingResponse:
        body = await request.json()
        seen.append({"path": request.url.path, **body})
        return streamed(descriptions(body["regions"], pace))

    return app


def said(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def streamed(events: AsyncIterator[Any]) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        async for event in events:
            yield f"data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


async def choices(text: str, pace: float) -> AsyncIterator[Any]:
    yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    for word in text.split(" "):
        await asyncio.sleep(pace)
        yield {"choices": [{"index": 0, "delta": {"content": word + " "}, "finish_reason": None}]}
    yield {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


async def descriptions(regions: list[Any], pace: float) -> AsyncIterator[Any]:
    texts = [f"A region given as a {next(iter(region))}." for region in regions]
    for index, text in reversed(list(enumerate(texts))):
        for word in text.split(" "):
            await asyncio.sleep(pace)
            yield {"index": index, "delta": word + " "}
        yield {"index": index, "text": text, "finish_reason": "stop"}


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an app on a free port of the loopback; gives its address, with a slash at the end."""
    listener = socket.create_server(("127.0.0.1", 0))  # closed by the server
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline, "the server did not start in time"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
