"""The page at `/`: plain files of this package, under a strict content security policy. Needs no API key."""

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, JSONResponse, Response

PAGE = Path(str(files("garserve.serving") / "page"))
SAMPLE = Path(str(files("garserve") / "data" / "coffee.jpg"))

# Text types for scripts differ between machines: what is served does not follow the system's table.
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
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked again each time, answered by 304: an upgraded server shows its own page
}

router = APIRouter(include_in_schema=False)


def _known() -> dict[str, Path]:
    found = {path.name: path for path in PAGE.iterdir() if path.suffix in _TYPES}
    return found | {"sample.jpg": SAMPLE}


_FILES = _known()  # names are looked up here, never in the file system: no path leads out of the folder


@router.get("/")
async def index() -> Response:
    """The page itself."""
    return _file(_FILES["index.html"])


@router.get("/page/{name}")
async def part(name: str) -> Response:
    """A file of the page."""
    path = _FILES.get(name)
    if path is None:
        return JSONResponse({"error": {"message": f"page: no file {name!r:.80}", "code": 404}}, 404)
    return _file(path)


def _file(path: Path) -> Response:
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=HEADERS)
