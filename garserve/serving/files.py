"""Images by file://, only from below one folder, whatever links or dots a path is made of."""

import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from garserve.serving.errors import APIError, too_large


def read_file(url: str, folder: Path | None, max_bytes: int) -> bytes:
    """Return the bytes of a file:// URL. Raises APIError (400 or 413) where it may not or cannot be read.

    The opened file itself is asked where it lies, so that a link which changes in between leads nowhere.
    """
    if folder is None:
        raise APIError(400, "image_url: this server reads no file:// images", code="image_url")
    try:
        parts = urlsplit(url)
        plain = parts.netloc in ("", "localhost") and not (parts.query or parts.fragment)
    except ValueError:  # half of an IPv6 address for the host
        plain = False
    if not plain:
        raise APIError(400, "image_url: expected file:///path", code="image_url")
    refusal = APIError(400, "image_url: no such file below the folder that this server reads from", code="image_file")
    root = os.path.realpath(folder)
    try:
        path = os.path.realpath(unquote(parts.path, errors="strict"))
        if not _below(path, root):
            raise refusal
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (OSError, ValueError):
        raise refusal from None
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or not _below(os.path.realpath(f"/proc/self/fd/{handle}"), root):
            raise refusal
        if found.st_size > max_bytes:
            raise too_large(f"image_url: {found.st_size} bytes; at most {max_bytes} are taken", param="image_url")
        return file.read(max_bytes)


def _below(path: str, root: str) -> bool:
    return path.startswith(root.rstrip("/") + "/")
