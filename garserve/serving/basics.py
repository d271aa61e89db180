"""The page, /health, /ready and /v1/models: what asks nothing of the engine."""

import mimetypes
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from garserve.serving.routes import Route
from garserve.serving.service import service

router = APIRouter(route_class=Route)
_PAGE = "page"
_SAFE = {
    # The page talks to its own server only, and nobody frames it.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


_UNWELL: dict[int | str, dict[str, Any]] = {503: {"description": "No requests should come."}}


@router.get("/health", responses=_UNWELL)
async def health(request: Request) -> Response:
    """200 while the server and its engine live; 503 when the engine has stopped."""
    alive, _ = request.app.state.garserve_lifecycle.state_of_health()
    return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)


@router.get("/ready", responses=_UNWELL)
async def ready(request: Request) -> Response:
    """200 when requests should come; 503 with the reason while warming up, going down, or without an engine."""
    _, reason = request.app.state.garserve_lifecycle.state_of_health()
    return JSONResponse({"ready": reason is None, "reason": reason}, 200 if reason is None else 503)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """List what is served, in OpenAI's form; vLLM's own list names the folder on the server's disk."""
    own = service(request)
    entry = {"object": "model", "created": own.started, "owned_by": "garserve", "max_model_len": own.max_model_len}
    return JSONResponse({"object": "list", "data": [{"id": name, **entry} for name in own.model_names]})


@router.get("/", include_in_schema=False)
async def index() -> Response:
    """Return the page to try it."""
    return _file("index.html")


@router.get("/page/{name:path}", include_in_schema=False)
async def page(name: str) -> Response:
    """Return a file of the page."""
    return _file(name)


def _file(name: str) -> Response:
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise HTTPException(404)
    found = files("garserve.serving").joinpath(_PAGE, *parts)
    if not found.is_file():
        raise HTTPException(404)
    kind = mimetypes.guess_type(parts[-1])[0] or "application/octet-stream"
    return Response(found.read_bytes(), media_type=kind, headers=_SAFE)
