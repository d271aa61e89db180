"""Which ids have been answered and which have come up: on disk, so that memory does not grow with their number."""

import sqlite3
from collections.abc import Iterable, Mapping
from typing import Any

from garserve.batch.record import Id, id_text
from garserve.batch.temporary import temporary_space


class Ledger:
    """Ids of rows and ids of the input, in SQLite's own temporary file. For one thread at a time.

    Every method raises SpaceError where there is no room for that file.
    """

    @temporary_space()
    def __init__(self) -> None:
        """Begin with none of either."""
        self._table = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._table.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -8000;"
            "CREATE TABLE answered (id TEXT PRIMARY KEY, request TEXT NOT NULL) WITHOUT ROWID;"
            "CREATE TABLE seen (id TEXT PRIMARY KEY) WITHOUT ROWID;"
        )

    @temporary_space()
    def answered(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Note the ids and the requests' digests of rows that the output has; return how many ids there are."""
        self._table.execute("BEGIN")
        noted = ((id_text(row["id"]), str(row.get("request", ""))) for row in rows)
        self._table.executemany("INSERT OR IGNORE INTO answered VALUES (?, ?)", noted)
        self._table.execute("COMMIT")
        (count,) = self._table.execute("SELECT count(*) FROM answered").fetchone()
        return int(count)

    @temporary_space()
    def note(self, row: Mapping[str, Any]) -> None:
        """Note one row that the output has now."""
        digest = str(row.get("request", ""))
        self._table.execute("INSERT OR IGNORE INTO answered VALUES (?, ?)", (id_text(row["id"]), digest))

    @temporary_space()
    def digest(self, identity: Id) -> str | None:
        """Return the digest of the request that an id was answered for, "" where none was kept; None if it was not."""
        found = self._table.execute("SELECT request FROM answered WHERE id = ?", (id_text(identity),)).fetchone()
        return None if found is None else str(found[0])

    @temporary_space()
    def first_time(self, identity: Id) -> bool:
        """Note an id of the input, and say whether it came up for the first time."""
        return self._table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (id_text(identity),)).rowcount == 1

    def close(self) -> None:
        """Drop everything."""
        self._table.close()
