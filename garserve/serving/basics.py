"""/health, /ready, /v1/models and one model of them: what asks nothing of the engine."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from garserve.serving.routes import Route
from garserve.serving.service import Service, service

router = APIRouter(route_class=Route)
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
    return JSONResponse({"object": "list", "data": [_entry(own, name) for name in own.model_names]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """Tell of one model that is served."""
    own = service(request)
    own.check_model(name)
    return JSONResponse(_entry(own, name))


def _entry(own: Service, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": name, "object": "model", "created": own.started, "owned_by": "garserve"}
    entry["prompts"] = own.prompt_count  # regions that one question can name
    return {**entry, "max_model_len": own.max_model_len}
