"""Which ids have been answered and which have come up: on disk, so that memory does not grow with their number."""

import sqlite3
from collections.abc import Iterable

from garserve.batch.record import Id, id_text


class Ledger:
    """Two sets of ids in SQLite's own temporary file. For one thread at a time."""

    def __init__(self) -> None:
        """Make both empty."""
        self._table = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._table.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -8000;"
            "CREATE TABLE answered (id TEXT PRIMARY KEY) WITHOUT ROWID;"
            "CREATE TABLE seen (id TEXT PRIMARY KEY) WITHOUT ROWID;"
        )

    def answered(self, ids: Iterable[Id]) -> int:
        """Note ids that the output has; return how many there were."""
        self._table.execute("BEGIN")
        self._table.executemany("INSERT OR IGNORE INTO answered VALUES (?)", ((id_text(one),) for one in ids))
        self._table.execute("COMMIT")
        (count,) = self._table.execute("SELECT count(*) FROM answered").fetchone()
        return int(count)

    def is_answered(self, identity: Id) -> bool:
        """Say whether the output has it."""
        found = self._table.execute("SELECT 1 FROM answered WHERE id = ?", (id_text(identity),)).fetchone()
        return found is not None

    def first_time(self, identity: Id) -> bool:
        """Note an id of the input, and say whether it came up for the first time."""
        return self._table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (id_text(identity),)).rowcount == 1

    def close(self) -> None:
        """Drop everything."""
        self._table.close()
