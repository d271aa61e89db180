"""Outputs in parts, and the station that answers bundles on a node: what `--ray` is made of, without Ray."""

import errno
import fcntl
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from garserve.batch.bundles import Bundle
from garserve.batch.journal import Journal, OutputError, read_rows
from garserve.batch.limits import Limits
from garserve.batch.outputs import write_parquet
from garserve.batch.parts import MANIFEST, Parts, read_manifest
from garserve.batch.prepare import Preparation
from garserve.batch.record import Member, Record
from garserve.batch.station import Station
from garserve.batch.wire import bundle_messages, read_bundle
from garserve.errors import GarserveError, RequestError
from tests.batch_data import rows, run_echo, write_requests
from tests.echo import EchoBackend, echo_engine


def fill(folder: Path, numbers: range, **options: Any) -> None:
    with Parts(folder, **options) as parts:
        for number in numbers:
            parts.append({"id": number, "error": "e"} if number % 5 == 4 else {"id": number, "text": "ü"})
        parts.write_manifest(complete=True)


def ids(folder: Path) -> list[Any]:
    return [row["id"] for row in read_rows(folder)]


def test_full_parts_are_sealed_and_the_last_one_is_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, range(25), rows_a_part=10)
    sealed = [(out / f"part-0000{i}.jsonl").read_bytes() for i in range(2)]
    fill(out, range(25, 40), rows_a_part=10)
    assert [(out / f"part-0000{i}.jsonl").read_bytes() for i in range(2)] == sealed
    assert ids(out) == list(range(40))
    manifest = read_manifest(out)
    assert (manifest["complete"], manifest["rows"], manifest["errors"]) == (True, 40, 8)
    assert [part["rows"] for part in manifest["parts"]] == [10, 10, 10, 10, 0]
    assert manifest["parts"][0]["bytes"] == len(sealed[0])


def test_a_crash_leaves_a_torn_line_and_a_manifest_that_lags(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, range(12), rows_a_part=10)
    with (out / "part-00001.jsonl").open("ab") as file:
        file.write(b'{"id": 12, "text": "a"}\n{"id": 13, "te')
    with Parts(out, rows_a_part=10) as parts:
        assert [row["id"] for row in parts.rows()] == list(range(13))
        parts.append({"id": 13, "text": "b"})
    (out / MANIFEST).unlink()  # the parts say themselves what they hold
    fill(out, range(14, 15), rows_a_part=10)
    assert ids(out) == list(range(15))
    assert read_manifest(out)["rows"] == 15


def test_parts_that_are_not_as_the_manifest_says(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, range(25), rows_a_part=10)
    shutil.copytree(out, tmp_path / "copy")
    (out / "part-00001.jsonl").unlink()
    with pytest.raises(RequestError, match=r"part-00001\.jsonl: missing, but manifest\.json names it"):
        Parts(out)
    out = tmp_path / "copy"
    whole = (out / "part-00000.jsonl").read_bytes()
    (out / "part-00000.jsonl").write_bytes(whole[:60])
    with pytest.raises(RequestError, match=rf"part-00000\.jsonl: expected the {len(whole)} bytes of manifest"):
        Parts(out)
    (out / "part-00000.jsonl").write_bytes(whole)
    (out / MANIFEST).write_text("{}")
    with pytest.raises(RequestError, match=r"manifest\.json: missing or broken"):
        Parts(out)


def test_a_crash_after_a_part_is_sealed_leaves_a_manifest_that_lags(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, range(15), rows_a_part=10)
    lagging = (out / MANIFEST).read_bytes()
    fill(out, range(15, 25), rows_a_part=10)
    (out / MANIFEST).write_bytes(lagging)
    fill(out, range(25, 27), rows_a_part=10)
    assert ids(out) == list(range(27))
    assert [part["rows"] for part in read_manifest(out)["parts"]] == [10, 10, 7]


def test_a_crash_while_errors_are_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    fill(out, range(25), rows_a_part=10)
    dropping, calls = Journal.drop_errors, []

    def full_disk(journal: Journal, *chosen: Any) -> int:
        calls.append(journal)
        if len(calls) == 2:
            raise OutputError("no space left")
        return dropping(journal, *chosen)

    monkeypatch.setattr(Journal, "drop_errors", full_disk)
    with Parts(out, rows_a_part=10) as parts, pytest.raises(OutputError, match="no space left"):
        parts.drop_errors()
    with Parts(out, rows_a_part=10) as parts:
        assert parts.drop_errors() == 3
    assert ids(out) == [i for i in range(25) if i % 5 < 4]


def test_a_next_part_that_cannot_be_made_ends_the_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Parts(out, rows_a_part=3) as parts:
        (out / "part-00001.jsonl").mkdir()
        parts.append({"id": 0, "text": "a"})
        parts.append({"id": 1, "text": "a"})
        with pytest.raises(OutputError, match=r"part-00001\.jsonl: is no regular file"):
            parts.append({"id": 2, "text": "a"})
        (out / "part-00001.jsonl").rmdir()
        parts.write_manifest(complete=False)
    assert read_manifest(out)["rows"] == 3


def test_a_first_part_without_rows_is_no_empty_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Parts(out, rows_a_part=2) as parts:
        for number in range(4):
            parts.append({"id": number, "error": "e"} if number < 2 else {"id": number, "text": "a"})
        assert parts.drop_errors() == 2
        assert not parts.empty


def test_folders_that_cannot_be_an_output(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    for path, part in (
        (tmp_path / "mine", "holds something else than parts of a job"),
        (tmp_path / "file", "expected a folder of parts, got a file"),
        (tmp_path / "no" / "out", "no such folder"),
        (Path("/proc/out"), "cannot be written"),
    ):
        with pytest.raises(RequestError, match=part):
            Parts(path)
    with Parts(tmp_path / "out"), pytest.raises(RequestError, match="another job is writing it"):
        Parts(tmp_path / "out")


def test_errors_are_taken_out_of_every_part(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, range(25), rows_a_part=10)
    with Parts(out, rows_a_part=10) as parts:
        assert parts.drop_errors() == 5
        parts.append({"id": 4, "text": "now"})
    assert sorted(ids(out)) == [i for i in range(25) if i % 5 < 4 or i == 4]
    fill(out, range(0), rows_a_part=10)
    assert read_manifest(out)["errors"] == 0


def test_errors_of_chosen_ids_are_taken_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, range(25), rows_a_part=10)
    with Parts(out, rows_a_part=10) as parts:
        assert parts.drop_errors({4, 14}.__contains__) == 2
    assert ids(out) == [i for i in range(25) if i not in (4, 14)]
    assert read_manifest(out)["errors"] == 3


def test_what_lies_beside_parts_is_no_part(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, range(12), rows_a_part=10)
    for name in ("part-00000.bak.jsonl", "part-1.jsonl", "part-00000.jsonl~"):
        (out / name).write_text('{"id": 99, "text": "old"}\n')
    assert ids(out) == list(range(12))
    with Parts(out, rows_a_part=10) as parts:
        assert [row["id"] for row in parts.rows()] == list(range(12))


def test_a_folder_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(RequestError, match=r"out: cannot be locked \(No locks available\)"):
        Parts(tmp_path / "out")


def test_an_output_in_parts_becomes_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install garserve[parquet])")
    fill(tmp_path / "out", range(25), rows_a_part=10)
    assert write_parquet(tmp_path / "out", tmp_path / "out.parquet") == 25


@pytest.mark.parametrize("image", ["a.png", b"\x89PNG", Member("a.tar", 512, 90, "a.tar::a.png")])
def test_bundles_travel(image: Any) -> None:
    records = tuple(
        Record(f"line {i}", i, image, "a", ([1, 1, 9, 9],), {"question": "q"}, "cup", 9.5) for i in range(3)
    )
    bundle = Bundle(records, (True, False, True))
    assert read_bundle(bundle_messages(bundle)) == bundle


def station(mini: Path, backends: list[EchoBackend], workers: int = 0, restarts: int = 1) -> Station:
    remaining = iter(backends)
    limits = Limits(in_flight=8, restarts=restarts)
    return Station(
        Preparation(str(mini), max_tokens=3),
        lambda: echo_engine(mini, next(remaining)),
        limits=limits,
        workers=workers,
    )


def packages(folder: Path, count: int, size: int) -> list[list[Bundle]]:
    lines = [json.loads(line) for line in write_requests(folder, count * size).read_text().splitlines()]
    records = [
        Record(one["id"], one["id"], str(folder / one["image"]), one["image"], tuple(one["regions"])) for one in lines
    ]
    bundles = [Bundle((record,), (True,)) for record in records]
    return [bundles[i : i + size] for i in range(0, len(bundles), size)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_station_answers_several_calls_at_a_time(mini: Path, tmp_path: Path, workers: int) -> None:
    work = packages(tmp_path, 6, 10)
    run_echo(tmp_path / "in.jsonl", tmp_path / "whole.jsonl", mini)
    one, found = station(mini, [EchoBackend(dies_after=20), EchoBackend()], workers), {}
    calls = [threading.Thread(target=lambda i=i: found.update({i: one.answer(work[i])})) for i in range(len(work))]
    for call in calls:
        call.start()
    for call in calls:
        call.join(60)
    assert one.numbers["engine_restarts"] == 1
    one.close()
    for number, package in enumerate(work):
        assert {row["id"] for row in found[number]} == {bundle.records[0].id for bundle in package}
    texts = {row["id"]: row["text"] for answered in found.values() for row in answered}
    assert texts == {row["id"]: row["text"] for row in rows(tmp_path / "whole.jsonl")}


def test_a_station_whose_engine_keeps_dying_says_so_to_its_calls(mini: Path, tmp_path: Path) -> None:
    (work,) = packages(tmp_path, 1, 30)
    one = station(mini, [EchoBackend(dies_after=9), EchoBackend(dies_after=9)])
    with pytest.raises(GarserveError, match="the engine died: the engine has stopped"):
        one.answer(work)
    one.close()


def test_a_station_whose_engine_exits_says_so_to_its_calls(mini: Path, tmp_path: Path) -> None:
    def leaves() -> Any:
        if opened:
            raise SystemExit("no memory")  # as some of vLLM's checks do
        opened.append(True)
        return echo_engine(mini, EchoBackend(dies_after=9))

    opened: list[bool] = []
    (work,) = packages(tmp_path, 1, 30)
    one = Station(Preparation(str(mini), max_tokens=3), leaves, limits=Limits(in_flight=8, restarts=1))
    with pytest.raises(GarserveError, match="no memory"):
        one.answer(work)
    one.close()


def test_a_station_answers_what_cannot_be_asked_by_an_error(mini: Path, tmp_path: Path) -> None:
    one = station(mini, [EchoBackend()])
    records = (Record("line 1", 1, "gone.png", "gone.png", ([1, 1, 9, 9],)), Record("line 2", 2, error="not JSON"))
    found = one.answer([Bundle((record,), (True,)) for record in records])
    assert one.answer([]) == []
    one.close()
    assert {row["id"]: row["error"] for row in found} == {1: "gone.png: no such file", 2: "not JSON"}
