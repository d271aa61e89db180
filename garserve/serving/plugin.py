"""Entry point `vllm.endpoint_plugins`: garserve's routes in the place of vLLM's, on vLLM's own server.

Loaded where VLLM_PLUGINS names `garserve`, by `garserve serve` and by a plain `vllm serve` alike.
"""

from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from garserve.config import read_config
from garserve.inputs.processor import Processor
from garserve.inputs.prompts import stop_token_id
from garserve.serving import basics, chat, describe, openapi, page_routes, refine
from garserve.serving.admission import Admission
from garserve.serving.decoding import RegionEngineClient
from garserve.serving.errors import APIError
from garserve.serving.gate import Gate
from garserve.serving.lifecycle import Lifecycle
from garserve.serving.logs import set_up
from garserve.serving.preparation import Preparer
from garserve.serving.routes import Route
from garserve.serving.service import Service
from garserve.serving.settings import Settings, folder_of_images
from garserve.vllm_plugin.multimodal import checkpoint_folder, engine_max_num_tiles

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.tasks import SupportedTask

_router = APIRouter(route_class=Route)
ROUTERS = [_router, basics.router, page_routes.router, chat.router, describe.router, refine.router]

# Of vLLM's own routes; the others take images and control tokens past garserve's limits, or control the server.
_KEPT = ("/metrics", "/version", "/openapi.json")


@_router.get("/load")
async def load(request: Request) -> Response:
    """How many requests this API process has in work or waiting. In vLLM's form; vLLM's own counts its own routes."""
    return JSONResponse({"server_load": request.app.state.garserve_admission.in_work})


class RegionEndpoints:
    """What vLLM makes of the entry point."""

    name = "garserve"
    required_tasks: "tuple[SupportedTask, ...] | None" = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Take away the routes that are not safe to expose, and add garserve's with the gate before them."""
        settings = getattr(app.state.args, "garserve", None) or _of_environment()
        admission = Admission(settings.max_queue)
        app.state.garserve_settings, app.state.garserve_admission = settings, admission
        set_up(settings.log_format)
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in _KEPT]
        for router in ROUTERS:
            app.include_router(router)
        app.exception_handler(HTTPException)(_http_error)  # 404 and 405; vLLM's own handler is for FastAPI's class
        app.add_middleware(Gate, settings=settings, admission=admission)
        openapi.install(app, keys=bool(settings.api_keys))
        app.router.lifespan_context = _around(app.router.lifespan_context)

    async def init_state(self, engine_client: "EngineClient | None", state: State, args: Namespace) -> None:
        """Make what the routes share, now that there is an engine."""
        if engine_client is None:
            return
        settings: Settings = state.garserve_settings
        model_config = engine_client.model_config
        from vllm.platforms import current_platform

        folder = checkpoint_folder(model_config)
        config = read_config(folder).with_box_scale(model_config.hf_config.replay_box_scale)
        processor = Processor(folder, config, max_num_tiles=engine_max_num_tiles(model_config))
        stop_id = stop_token_id(processor.tokenizer)
        engine = RegionEngineClient(engine_client, processor.tokenizer, stop_id)
        state.garserve = Service(
            settings=settings,
            admission=state.garserve_admission,
            preparer=Preparer(processor, settings),
            engine=engine,
            chat=chat.region_chat(state.openai_serving_chat, engine),
            stop_id=stop_id,
            model_names=[model.name for model in state.openai_serving_models.base_model_paths],
            max_model_len=model_config.max_model_len,
            seeds=not current_platform.is_cpu(),
        )
        state.garserve_lifecycle = Lifecycle(state.garserve, state)


def _of_environment() -> Settings:
    """Return the settings of a plain `vllm serve`; `garserve serve` has checked its own."""
    settings = Settings.from_environment()
    if settings.image_folder is not None:
        folder_of_images(str(settings.image_folder), "GARSERVE_SERVE_IMAGE_FOLDER")
    return settings


def _around(lifespan: Any) -> Any:
    """Run garserve's lifecycle inside vLLM's lifespan."""

    @asynccontextmanager
    async def both(app: FastAPI) -> AsyncIterator[Any]:
        async with lifespan(app) as state, app.state.garserve_lifecycle.running():
            yield state

    return both


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  (for the type checker)
    phrase = HTTPStatus(error.status_code).phrase
    path = request.scope["path"]
    code = phrase.lower().replace(" ", "_")
    return APIError(
        error.status_code, f"{phrase}: {request.method} {path:.80}", code=code, headers=error.headers
    ).response()
