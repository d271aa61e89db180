"""Errors in the shape that OpenAI's clients know: {"error": {"message", "type", "param", "code"}}."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from garserve.errors import InputError

RETRY_SECONDS = 1  # after which a client may try again
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}
_KIND = re.compile(r"^(?:constrained-)?(?:str|list)$|\[")  # how pydantic calls the branches of a union
# pydantic speaks of Python's types here
_WORDS = {
    "model_type": "expected an object",
    "model_attributes_type": "expected an object",
    "dict_type": "expected an object",
    "list_type": "expected a list",
}
_NAME = 60  # of a field that a client made up
_MESSAGE = 1000  # characters: a message may quote what a client sent
_FIELD = re.compile(r"^([A-Za-z_][\w.]*(?:\[\d+\])?(?:\.[A-Za-z_]\w*|\[\d+\])*): ")


class APIError(Exception):
    """An answer that is an error: its status, a message for people, and a code for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or "invalid_request"
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def from_input(error: InputError) -> APIError:
    """Return what garserve says about a request as a 400; its first words name the field."""
    message = str(error)[:_MESSAGE]
    named = _FIELD.match(message)
    return APIError(400, message, param=named[1] if named else None)


def from_validation(error: ValidationError) -> APIError:
    """Return pydantic's most precise complaint as a 400."""
    # Of a field that may be of several kinds, the complaint that looked deepest is about the kind that was meant; so is
    # one that has got past the type.
    found = error.errors(include_url=False, include_context=False)
    first = max(found, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    where = ".".join(str(part)[:_NAME] for part in first["loc"] if not _KIND.search(str(part)))
    said = _WORDS.get(first["type"], first["msg"])
    got = "" if first["type"] == "missing" else f", got {_short(first.get('input'))}"
    return APIError(400, f"{where or 'body'}: {said}{got}", param=where or None)


def _short(value: object) -> str:
    """Describe a value in a few words; a large one is not rendered first."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, str | bytes):
        return repr(value[:60]) + ("…" if len(value) > 60 else "")
    return f"{value!r:.60}"


def too_large(message: str, *, param: str | None = None) -> APIError:
    """A 413."""
    return APIError(413, message, code="too_large", param=param)


def internal() -> APIError:
    """A 500 that says nothing of the inside; the log has it."""
    return APIError(500, "internal error; the server's log has it under this request's id", code="internal_error")


def cut_off() -> APIError:
    """A 503 for an answer that the engine ended before its end."""
    return APIError(503, "the answer was cut off; this server is going down", code="cut_off")


def not_admitted(status: int, message: str) -> APIError:
    """What vLLM's own limits of its queue refuse, with the status that it gives."""
    return APIError(status, message, code="queue_full", headers={"Retry-After": str(RETRY_SECONDS)})


def engine_dead() -> APIError:
    """A 503 for the requests of an engine that is gone."""
    return APIError(503, "the engine has stopped; this server is going down", code="engine_dead")
