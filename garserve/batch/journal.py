"""The output: JSON lines that only ever grow, whole lines or nothing, locked against a second job."""

import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from garserve.batch.record import Id
from garserve.errors import GarserveError, RequestError

_ROW_START = b'{"id": '
_PART = re.compile(r"part-\d{5,}\.jsonl")
SYNC_SECONDS = 1.0  # what a power cut may cost; a killed process costs nothing that was written


class OutputError(GarserveError):
    """The output cannot be written any further, as on a full disk."""


class Sink(Protocol):
    """Where rows go: `append` writes one, `sync` brings what was written to safety."""

    def append(self, row: dict[str, Any]) -> None:
        """Take a row; OutputError where that fails."""

    def sync(self, *, force: bool = True) -> None:
        """Make rows safe, now or where it is time; OutputError where that fails."""


class Journal:
    """An output file, open for appending. A torn last line, as a crash leaves it, is cut off when it is opened."""

    def __init__(self, path: Path, *, sync_seconds: float = SYNC_SECONDS) -> None:
        """Open and lock the file; RequestError where it cannot be written or locked, or another job has it."""
        self.path = path
        self._sync_seconds = sync_seconds
        if not path.parent.is_dir():
            raise RequestError(f"output {path}: no such folder: {path.parent}")
        if path.exists() and not path.is_file():
            raise RequestError(f"output {path}: is no regular file")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RequestError(f"output {path}: cannot be written ({error.strerror})") from None
        try:
            lock(self._file, path)
            self.cut = self._cut_torn_line()  # bytes
        except BaseException:
            os.close(self._file)
            raise
        self._synced = time.monotonic()
        self._unsynced = False

    def _cut_torn_line(self) -> int:
        """Cut off what follows the last line break and return its bytes; RequestError where the file is not ours."""
        size = os.fstat(self._file).st_size
        head = os.pread(self._file, len(_ROW_START), 0)
        if head != _ROW_START[: len(head)]:
            raise RequestError(f"output {self.path}: holds something else than rows of a job; it is left as it is")
        end = _whole_lines(self._file, size)
        if end < size:
            os.ftruncate(self._file, end)
        return size - end

    @property
    def empty(self) -> bool:
        """Whether no row was written yet."""
        return os.fstat(self._file).st_size == 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that are there, one by one; RequestError names a line that is none."""
        yield from read_rows(self.path)

    def append(self, row: dict[str, Any]) -> None:
        """Write a row; OutputError where that fails, and then the file ends with the row before."""
        # Half a character of an id is written as the JSON escape that it came from.
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        end = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            os.ftruncate(self._file, end)
            raise OutputError(f"output {self.path}: cannot be written ({error.strerror})") from None
        self._unsynced = True
        self.sync(force=False)

    def sync(self, *, force: bool = True) -> None:
        """Bring what was written to the disk, now or where the interval has passed; OutputError where that fails."""
        if not self._unsynced or (not force and time.monotonic() - self._synced < self._sync_seconds):
            return
        try:
            os.fsync(self._file)
        except OSError as error:
            raise OutputError(f"output {self.path}: cannot be written ({error.strerror})") from None
        self._synced, self._unsynced = time.monotonic(), False

    def drop_errors(self, chosen: Callable[[Id], bool] = lambda _: True) -> int:
        """Take out the rows that are errors, of `chosen` ids, so that they are asked again; return how many there were.

        The rows that stay are written beside the file, which they replace whole; a link to it stays a link.
        """
        target = self.path.resolve()
        beside = target.with_name(f".{target.name}.retry")
        dropped = 0
        try:
            with beside.open("wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for row in self.rows():
                    if "error" in row and chosen(row["id"]):
                        dropped += 1
                        continue
                    line = json.dumps(row, ensure_ascii=False) + "\n"
                    file.write(line.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
                beside.replace(target)
                os.close(self._file)
                self._file = os.open(target, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            lock(self._file, self.path)
        except OSError as error:
            raise OutputError(f"output {self.path}: cannot be written ({error.strerror})") from None
        return dropped

    def close(self) -> None:
        """Bring everything to the disk and let go of the file."""
        try:
            self.sync()
        finally:
            os.close(self._file)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock(file: int, path: Path) -> None:
    """Lock an open file of the output `path`; RequestError where another job has it, or where it cannot be locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RequestError(f"output {path}: another job is writing it") from None
    except OSError as error:
        raise RequestError(
            f"output {path}: cannot be locked ({error.strerror}); expected a file system that has locks"
        ) from None


def part_paths(folder: Path) -> list[Path]:
    """Return the parts of a folder in their order; nothing else that lies there is one."""
    return sorted(path for path in folder.iterdir() if _PART.fullmatch(path.name))


def read_rows(path: Path, size: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of an output, a file or a folder of parts, or those in the first `size` bytes of a file.

    A torn last line is left out. RequestError names another line that is no row.
    """
    if path.is_dir():
        for part in part_paths(path):
            yield from read_rows(part)
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        end = 0
        for number, line in enumerate(file, start=1):
            end += len(line)
            if not line.endswith(b"\n") or (size is not None and end > size):
                return
            try:
                row = json.loads(line)
                row["id"]
            except (ValueError, TypeError, LookupError, RecursionError):
                raise RequestError(
                    f"{path}: line {number} is no row of a job; expected an output of garserve"
                ) from None
            yield row


def _whole_lines(file: int, size: int) -> int:
    """Return where the last whole line ends."""
    position = size
    while position > 0:
        piece = min(1 << 16, position)
        found = os.pread(file, piece, position - piece).rfind(b"\n")
        if found >= 0:
            return position - piece + found + 1
        position -= piece
    return 0
