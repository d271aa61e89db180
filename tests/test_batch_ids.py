"""`--ids`: ids that the input does not have are told, and temporary space that runs out has a name."""

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from typer.testing import CliRunner

from garserve.batch import outputs, source_coco
from garserve.batch.feeder import Feeder
from garserve.batch.filters import Filters, Shard
from garserve.batch.ledger import Ledger
from garserve.batch.pool import WorkerPool
from garserve.batch.prepare import Preparation
from garserve.batch.record import Record
from garserve.batch.report import write_report
from garserve.batch.selection import Selection
from garserve.batch.sources import open_source
from garserve.batch.temporary import SpaceError, temporary_space
from garserve.cli import app
from garserve.cli_batch import _filters
from garserve.errors import RequestError
from tests.batch_data import rows, run_echo, write_requests
from tests.conftest import write_lines
from tests.echo import echo_engine

FULL = r"temporary space: cannot be used \(database or disk is full\); SQLITE_TMPDIR or TMPDIR says where it is"


def asking(*ids: str, **options: Any) -> dict[str, Any]:
    return {"filters": Filters(ids=frozenset(ids), **options)}


def test_ids_of_which_the_input_has_none_are_refused(mini: Path, tmp_path: Path) -> None:
    source, out = write_requests(tmp_path, 6), tmp_path / "out.jsonl"
    told = r"--ids: none of the 2 ids came up in .*in\.jsonl, such as 'R1'"
    for options in ({}, {"shard": Shard(0, 2)}, {"categories": frozenset({"cup"})}):
        with pytest.raises(RequestError, match=told):
            run_echo(source, out, mini, **asking("R1", "r 2", **options))
    assert rows(out) == []
    with pytest.raises(RequestError, match=told):
        run_echo(source, out, mini, **asking("R1", "r 2"), retry_errors=True)


def test_ids_that_never_came_up_are_counted(mini: Path, tmp_path: Path) -> None:
    source, out = write_requests(tmp_path, 6, images=6), tmp_path / "out.jsonl"
    assert run_echo(source, out, mini, **asking("r1", "r2", "r9")).unmet == {"r9"}
    assert run_echo(source, out, mini, **asking("r1", "r2", "r9")).unmet == {"r9"}, "also where all is answered"
    assert run_echo(source, out, mini, **asking("r1", "r5")).unmet == set()
    assert run_echo(source, out, mini).unmet == set()


def test_ids_of_another_shard_or_behind_a_limit_are_no_mistake(mini: Path, tmp_path: Path) -> None:
    source, out = write_requests(tmp_path, 12, images=12), tmp_path / "out.jsonl"
    ids = [f"r{number}" for number in range(12)]
    parts = [run_echo(source, out, mini, **asking(*ids, shard=Shard(part, 2))) for part in range(2)]
    assert [totals.unmet for totals in parts] == [frozenset()] * 2
    assert sum(totals.rows for totals in parts) == 12
    assert run_echo(source, tmp_path / "few.jsonl", mini, **asking(*ids, "r99", limit=3)).unmet == set()


class Stopped:
    """A source whose job is stopped while it is read."""

    path, total = Path("in"), None

    def __init__(self) -> None:
        self.stop: Callable[[], None] = lambda: None

    def records(self) -> Iterator[Record]:
        for number in range(20):
            if number == 10:
                self.stop()
            yield Record(f"line {number}", number, "a.png", "a.png", ([1, 1, 9, 9],))


def test_ids_that_were_not_read_are_no_mistake(mini: Path) -> None:
    """A job that is stopped does not know what the rest of the input has."""
    for stops, unmet in ((False, {"99"}), (True, set())):
        source = Stopped()
        selection = Selection(source, Filters(ids=frozenset({"1", "15", "99"})))
        with WorkerPool(Preparation(str(mini)), 0) as pool:
            feeder = Feeder(selection, Ledger(), pool, SimpleQueue())
            if stops:
                source.stop = feeder._stopped.set
            assert len(list(feeder._bundles())) == 1
        assert feeder.unmet == unmet


def test_the_command_tells_ids_that_never_came_up(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("garserve.cli_batch.load_engine", lambda *_, **__: echo_engine(mini))
    source, ids = write_requests(tmp_path, 6), tmp_path / "ids.txt"
    ids.write_text("r1\nr2\n\nx\ny\n")
    told = ["batch", "-i", source, "-o", tmp_path / "out.jsonl", "-c", mini, "--ids", ids, "--workers", 0, "--json"]
    result = CliRunner().invoke(app, [str(one) for one in told], catch_exceptions=False)
    assert (result.exit_code, json.loads(result.stdout)["rows"]) == (0, 2)
    assert "--ids: 2 of the 4 ids never came up in the input, such as 'x'" in result.stderr + capfd.readouterr().err


def test_ids_that_hold_odd_separators(mini: Path, tmp_path: Path) -> None:
    names = ["a\u2028b", "c\x85d", "e\x0bf"]
    write_requests(tmp_path, 1)
    lines = [{"id": name, "image": "0.png", "regions": [[1, 1, 9, 9]]} for name in [*names, "other"]]
    (tmp_path / "ids.txt").write_bytes("\r\n".join(names).encode())
    filters = _filters(None, None, None, tmp_path / "ids.txt", None, None)
    assert filters.ids == set(names)
    totals = run_echo(write_lines(tmp_path / "odd.jsonl", list(lines)), tmp_path / "out.jsonl", mini, filters=filters)
    assert (totals.rows, totals.unmet) == (3, frozenset())


def small(*_: Any, **__: Any) -> sqlite3.Connection:
    """Return a table for which the disk has no room."""
    table = sqlite3.Connection("", isolation_level=None)
    table.execute("PRAGMA max_page_count = 5")
    return table


def test_temporary_space_that_runs_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = [{"id": number, "image_id": 1, "bbox": [1, 1, 5, 5], "note": "x" * 200} for number in range(400)]
    source, out = tmp_path / "c.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}], "annotations": boxes}))
    answered = [{"id": number, "text": "x" * 200, "request": "x" * 200} for number in range(400)]
    write_lines(out, list(answered))
    records = open_source(source).records()
    monkeypatch.setattr(sqlite3, "connect", small)
    ledger = Ledger()
    with pytest.raises(SpaceError, match=FULL):
        next(records)
    with pytest.raises(SpaceError, match=FULL):
        ledger.answered(answered)
    with pytest.raises(SpaceError, match=FULL):
        list(map(Ledger().first_time, (f"{number:0200}" for number in range(5000))))
    with pytest.raises(SpaceError, match=FULL):
        outputs.write_coco(source, out, tmp_path / "captions.json")
    assert not (tmp_path / "captions.json").exists()


def test_errors_that_are_not_of_temporary_space_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="another"), temporary_space():
        raise RequestError("another")
    (tmp_path / "c.json").write_text('{"images": [{"id": 1}], "annotations": [{"id": 1,')
    with pytest.raises(RequestError, match="not JSON"):
        list(source_coco.CocoSource(tmp_path / "c.json", source_coco.Reading()).records())


def test_a_page_has_ids_to_the_last_digit(tmp_path: Path) -> None:
    """A browser's numbers end at 2**53."""
    ids = [2**53 + 1, 7, "r1"]
    out = write_lines(tmp_path / "out.jsonl", [{"id": one, "text": "A cup."} for one in ids])
    write_report(out, page := tmp_path / "page.html")
    (line,) = (line for line in page.read_text().splitlines() if line.startswith('<script type="application/json"'))
    shown = json.loads(line.partition(">")[2].removesuffix("</script>"))["rows"]
    assert [row["id"] for row in shown] == ["9007199254740993", "7", "r1"]
