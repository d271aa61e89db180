"""Routes whose failures are answers in OpenAI's shape, and tell nothing of the inside."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from garserve.serving.answering import as_api_error


class Route(APIRoute):
    """For `APIRouter(route_class=Route)`: vLLM's handlers would put an exception's words into the answer."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler with every exception made an answer."""
        handler = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except HTTPException:
                raise
            except Exception as error:
                return as_api_error(error, request).response()

        return guarded
