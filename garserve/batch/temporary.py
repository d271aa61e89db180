"""SQLite's own temporary files: what would not fit into memory, gone when its table is closed."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from garserve.errors import GarserveError


class SpaceError(GarserveError):
    """There is no room, or no leave, to keep what a job has to remember."""


@contextmanager
def temporary_space() -> Iterator[None]:
    """Make what SQLite says while it works on such a file, as that the disk is full, a SpaceError."""
    try:
        yield
    except sqlite3.Error as error:
        raise SpaceError(
            f"temporary space: cannot be used ({error}); SQLITE_TMPDIR or TMPDIR says where it is"
        ) from None
