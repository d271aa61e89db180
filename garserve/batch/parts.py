"""An output in parts: a folder of JSON-lines files, each a journal, and a manifest that says what they hold."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

from garserve import __version__
from garserve.batch.journal import Journal, OutputError, lock, part_paths, read_rows
from garserve.batch.record import Id
from garserve.errors import RequestError

MANIFEST, LOCK = "manifest.json", ".lock"
ROWS_A_PART = 10_000


class Parts:
    """Rows go to the last part until it is full; then it is sealed, and never written again but to drop errors."""

    def __init__(self, path: Path, *, rows_a_part: int = ROWS_A_PART) -> None:
        """Open and lock the folder, made where it is missing; RequestError where it cannot be one of parts."""
        self.path, self._rows_a_part = path, rows_a_part
        if not path.parent.is_dir():
            raise RequestError(f"output {path}: no such folder: {path.parent}")
        if path.exists() and not path.is_dir():
            raise RequestError(f"output {path}: expected a folder of parts, got a file")
        self._journal: Journal | None = None
        self._lock = -1
        try:
            path.mkdir(exist_ok=True)
            self._check_contents()
            self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            lock(self._lock, path)
            self._parts = self._read_parts()
            self._open_last()
        except BaseException as error:
            if self._lock >= 0:
                os.close(self._lock)
            if isinstance(error, OSError):
                raise RequestError(f"output {path}: cannot be written ({error.strerror})") from None
            raise

    def _check_contents(self) -> None:
        inside = {entry.name for entry in self.path.iterdir()}
        if inside - {LOCK} and not {MANIFEST, "part-00000.jsonl"} & inside:
            raise RequestError(f"output {self.path}: holds something else than parts of a job; it is left as it is")

    def _read_parts(self) -> list[dict[str, Any]]:
        """Return what the manifest says of the parts; the last one, now and there, is counted anew."""
        noted = {part["name"]: part for part in read_manifest(self.path)["parts"]} if self._manifest.exists() else {}
        written = max(noted, default="")  # the one that was being written when the manifest was
        parts = []
        paths = part_paths(self.path)
        for path in paths:
            known = noted.pop(path.name, None)
            if known is None or path == paths[-1] or path.name == written:
                with Journal(path):  # a torn last line is cut off
                    known = _described(path)
            elif known["bytes"] != path.stat().st_size:
                raise RequestError(
                    f"output {path}: expected the {known['bytes']} bytes of {MANIFEST}, got {path.stat().st_size}"
                )
            parts.append(known)
        if noted:
            raise RequestError(f"output {self.path / min(noted)}: missing, but {MANIFEST} names it")
        return parts

    def _open_last(self) -> None:
        if self._parts and self._parts[-1]["rows"] < self._rows_a_part:
            self._journal = Journal(self.path / self._parts[-1]["name"])
            return
        name = f"part-{len(self._parts):05}.jsonl"
        self._journal = Journal(self.path / name)
        self._parts.append({"name": name, "rows": 0, "errors": 0})

    @property
    def _manifest(self) -> Path:
        return self.path / MANIFEST

    @property
    def empty(self) -> bool:
        """Whether no row was written yet."""
        return not any(part["rows"] for part in self._parts)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of all parts; RequestError names a line that is none."""
        yield from read_rows(self.path)

    def append(self, row: dict[str, Any]) -> None:
        """Write a row to the last part; OutputError where that fails."""
        assert self._journal is not None  # noqa: S101  (open until it is closed)
        self._journal.append(row)
        last = self._parts[-1]
        last["rows"] += 1
        last["errors"] += "error" in row
        if last["rows"] >= self._rows_a_part:
            self._seal()
            try:
                self._open_last()
            except RequestError as error:  # it is too late for one
                raise OutputError(str(error)) from None
            self.write_manifest(complete=False)

    def sync(self, *, force: bool = True) -> None:
        """Bring what was written to the disk, now or where it is time."""
        if self._journal is not None:
            self._journal.sync(force=force)

    def drop_errors(self, chosen: Callable[[Id], bool] = lambda _: True) -> int:
        """Take out the rows that are errors, of `chosen` ids, from all parts; return how many there were."""
        self._seal()
        self._manifest.unlink(missing_ok=True)  # parts of two sizes would contradict it, were this to end half-way
        dropped = 0
        for number, part in enumerate(self._parts):
            if part["errors"]:
                with Journal(self.path / part["name"]) as journal:
                    dropped += journal.drop_errors(chosen)
                self._parts[number] = _described(self.path / part["name"])
        self.write_manifest(complete=False)
        self._open_last()
        return dropped

    def write_manifest(self, *, complete: bool) -> None:
        """Write what the parts hold; `complete` says that every record of the input has its row."""
        self.sync()
        last = self.path / self._parts[-1]["name"]
        self._parts[-1] = _described(last)
        content = {
            "garserve": __version__,
            "complete": complete,
            "rows": sum(part["rows"] for part in self._parts),
            "errors": sum(part["errors"] for part in self._parts),
            "parts": self._parts,
        }
        beside = self.path / f".{MANIFEST}.new"
        try:
            with beside.open("w", encoding="utf-8") as file:
                json.dump(content, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._manifest)
        except OSError as error:
            raise OutputError(f"output {self._manifest}: cannot be written ({error.strerror})") from None

    def _seal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
            self._parts[-1] = _described(self.path / self._parts[-1]["name"])

    def close(self) -> None:
        """Bring everything to the disk and let go of the folder."""
        try:
            if self._journal is not None:
                self._journal.close()
        finally:
            os.close(self._lock)

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder of parts; RequestError where it is missing or broken."""
    try:
        content = dict(json.loads((folder / MANIFEST).read_bytes()))
        if all({"name", "rows", "errors", "bytes"} <= set(part) for part in content["parts"]):
            return content
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise RequestError(f"{folder / MANIFEST}: missing or broken; expected the manifest of an output in parts")


def _described(path: Path) -> dict[str, Any]:
    """Return a part's name, rows, errors, bytes and BLAKE3."""
    rows = errors = 0
    for row in read_rows(path):
        rows += 1
        errors += "error" in row
    digest = blake3().update_mmap(path) if path.stat().st_size else blake3()
    size = path.stat().st_size
    return {"name": path.name, "rows": rows, "errors": errors, "bytes": size, "blake3": digest.hexdigest()}
