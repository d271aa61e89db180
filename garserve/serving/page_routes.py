"""The page at `/`: plain files of this package, under a strict content security policy. Needs no API key."""

import hashlib
from functools import lru_cache
from importlib.resources import files
from pathlib import PurePosixPath

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

# The table of the system says other things on every machine; what browsers run has to have the right type.
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked again each time, and answered by 304: an upgraded server shows its own page
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def index(request: Request) -> Response:
    """The page itself."""
    return _answer(request, "index.html")


@router.get("/page/{name:path}")
async def part(request: Request, name: str) -> Response:
    """A file of the page."""
    return _answer(request, name)


@lru_cache(maxsize=1)
def _contents() -> dict[str, tuple[bytes, str]]:
    """Return each file's bytes and tag, once read: names are looked up here, and no path leads to other files."""
    found = {file.name: file.read_bytes() for file in files("garserve.serving").joinpath("page").iterdir()}
    found["sample.jpg"] = files("garserve").joinpath("data", "coffee.jpg").read_bytes()
    return {name: (content, f'"{hashlib.sha256(content).hexdigest()[:24]}"') for name, content in found.items()}


def _answer(request: Request, name: str) -> Response:
    if name not in _contents():
        raise HTTPException(404)
    content, tag = _contents()[name]
    headers = {**_HEADERS, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=_TYPES[PurePosixPath(name).suffix], headers=headers)
