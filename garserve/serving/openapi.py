"""The OpenAPI document: bodies are read by garserve itself, so their schemas are put in here."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from garserve import __version__
from garserve.serving.schemas import ErrorBody

_REFERENCE = "#/components/schemas/{model}"
_ABOUT = {
    400: "The request cannot be used; `param` names the field.",
    401: "No key of this server.",
    404: "No such model.",
    408: "The body did not come in time.",
    413: "The body or the image is too large.",
    415: "Not JSON.",
    429: "Enough requests are in work; `Retry-After` says when to try again.",
    503: "Going down, or the engine has stopped.",
    504: "No answer in time.",
}
_models: dict[str, type[BaseModel]] = {}


def documented(
    body: type[BaseModel], *, summary: str, answer: type[BaseModel] | None = None, stream: bool = False
) -> dict[str, Any]:
    """Return the keyword arguments of a route whose JSON body is read by hand, so that the document has it all."""
    for model in (body, answer, ErrorBody):
        if model is not None:
            _models[model.__name__] = model
    schema = {"type": "object"} if answer is None else {"$ref": _REFERENCE.format(model=answer.__name__)}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    error = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="ErrorBody")}}}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    responses |= {str(status): {"description": about, "content": error} for status, about in _ABOUT.items()}
    request = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=body.__name__)}}}
    return {
        "summary": summary,
        "response_model": None,
        "openapi_extra": {"requestBody": {"required": True, "content": request}, "responses": responses},
    }


def install(app: FastAPI, *, keys: bool) -> None:
    """Give the app a document of its own routes."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, keys)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI, keys: bool) -> dict[str, Any]:
    document = get_openapi(
        title="garserve",
        version=__version__,
        description="Descriptions of regions of images, and answers about them. Errors have OpenAI's shape.",
        routes=app.routes,
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for model in _models.values():
        schema = model.model_json_schema(ref_template=_REFERENCE)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    for methods in document["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    if keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document
