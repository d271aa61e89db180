"""Running a requests file through an engine: a row of output for every line, in their order."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from garserve.batch.sources import Line, read_lines
from garserve.engine import Answer, Engine
from garserve.errors import GarserveError, InputError, RequestError
from garserve.inputs.request import RegionRequest


@dataclass
class Totals:
    """What a job has done so far."""

    rows: int = 0
    errors: int = 0
    regions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0


def check_paths(source: Path, target: Path) -> None:
    """Check that the output can be written and is not the input; RequestError where not."""
    if not source.is_file():
        raise RequestError(f"input {source}: expected a regular file (it is read twice)")
    if not target.parent.is_dir():
        raise RequestError(f"output {target}: no such folder: {target.parent}")
    if target.exists() and (not target.is_file() or target.samefile(source)):
        raise RequestError(f"output {target}: is {'the input itself' if target.is_file() else 'no regular file'}")
    if not os.access(target.parent, os.W_OK):
        raise RequestError(f"output {target}: its folder cannot be written to")


def count_lines(path: Path) -> int:
    """Count the lines that are not blank, for a progress bar."""
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def run_batch(
    engine: Engine, source: Path, target: Path, *, max_tokens: int = 256, on_row: Callable[[Totals], None] | None = None
) -> Totals:
    """Answer every line of `source` into `target`, one JSON row each; a bad line becomes an error row.

    Rows are written to a file beside the target, which takes its name when all are there: an interrupted job leaves
    no half output under the target's name.
    """
    check_paths(source, target)
    totals = Totals()
    partial = target.with_name(target.name + ".partial")
    # Half a character of an id is written as the JSON escape that it came from.
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as out:
        for line, outcome in _answer_lines(engine, read_lines(source, max_tokens)):
            out.write(json.dumps(_row(line, outcome, totals), ensure_ascii=False) + "\n")
            out.flush()
            if on_row:
                on_row(totals)
        os.fsync(out.fileno())
    partial.replace(target)
    return totals


def _answer_lines(engine: Engine, lines: Iterator[Line]) -> Iterator[tuple[Line, Answer | GarserveError]]:
    pending: deque[Line] = deque()

    def requests() -> Iterator[RegionRequest | InputError]:
        for line in lines:
            pending.append(line)
            yield line.request

    for outcome in engine.outcomes(requests()):
        yield pending.popleft(), outcome


def _row(line: Line, outcome: Answer | GarserveError, totals: Totals) -> dict[str, Any]:
    totals.rows += 1
    if isinstance(outcome, GarserveError):
        totals.errors += 1
        return {"id": line.id, "line": line.number, "error": str(outcome)}
    if isinstance(line.request, RegionRequest):
        totals.regions += line.request.region_count
    totals.prompt_tokens += outcome.prompt_tokens
    totals.cached_tokens += outcome.cached_tokens
    totals.answer_tokens += len(outcome.token_ids)
    return {
        "id": line.id,
        "line": line.number,
        "text": outcome.text,
        "finish_reason": outcome.finish_reason,
        "prompt_tokens": outcome.prompt_tokens,
        "cached_tokens": outcome.cached_tokens,
        "answer_tokens": len(outcome.token_ids),
    }
