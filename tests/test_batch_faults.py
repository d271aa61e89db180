"""Faults: whatever happens to a job, its output has whole rows, each id once, and the same texts as without it."""

import ctypes
import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from garserve.batch.bundles import Bundle
from garserve.batch.feeder import Feeder
from garserve.batch.filters import Filters, Shard
from garserve.batch.job import Job
from garserve.batch.journal import Journal, OutputError, read_rows
from garserve.batch.ledger import Ledger
from garserve.batch.limits import Halt, Limits, Stop
from garserve.batch.parcel import Parcel
from garserve.batch.pool import WorkerPool
from garserve.batch.prepare import Preparation, Preparer, encoded
from garserve.batch.record import Record
from garserve.batch.run import run_job
from garserve.batch.selection import Selection
from garserve.cli import app
from garserve.cli_batch import _filters, _signals
from garserve.errors import GarserveError, RequestError
from garserve.inputs.processor import Processor
from garserve.model.tile_cache import TileCounts
from tests.batch_data import plan_of, rows, run_echo, write_requests
from tests.conftest import write_lines
from tests.echo import EchoBackend, echo_engine

COUNT = 60


def texts(path: Path) -> dict[Any, str]:
    """Return texts by id, each of which is there once."""
    found = rows(path)
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row["text"] for row in found}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_requests(tmp_path, COUNT)


@pytest.fixture
def whole(source: Path, mini: Path, tmp_path: Path) -> dict[Any, str]:
    """What an uninterrupted run says."""
    run_echo(source, tmp_path / "whole.jsonl", mini)
    return texts(tmp_path / "whole.jsonl")


class StoppingBackend(EchoBackend):
    """Tells a job to stop when it has been asked so often."""

    def __init__(self, stop: Stop, after: int, halt: Halt) -> None:
        super().__init__()
        self._stop, self._after, self._halt = stop, after, halt

    def submit(self, *arguments: Any) -> Any:
        cancel = super().submit(*arguments)
        if self.submitted == self._after:
            self._stop.tell("interrupted", self._halt)
        return cancel


@pytest.mark.parametrize("halt", [Halt.drain, Halt.now])
@pytest.mark.parametrize("group", [1, 4])
def test_a_stopped_job_goes_on(source: Path, mini: Path, tmp_path: Path, halt: Halt, group: int) -> None:
    out = tmp_path / "out.jsonl"
    run_echo(source, tmp_path / "whole.jsonl", mini, group=group)
    stop = Stop()
    first = run_echo(source, out, mini, stop=stop, backend=StoppingBackend(stop, 25, halt), group=group)
    assert stop.reason == "interrupted"
    assert len(rows(out)) == first.rows < COUNT
    assert first.rows == 25 if halt is Halt.drain else first.rows < 25
    second = run_echo(source, out, mini, group=group)
    assert (second.before, second.rows) == (first.rows, COUNT - first.rows)
    assert texts(out) == texts(tmp_path / "whole.jsonl")


def test_a_finished_job_needs_no_engine(source: Path, mini: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run_echo(source, out, mini)
    before = out.read_bytes()

    def none() -> Any:
        raise AssertionError("an engine was opened for nothing")

    assert run_echo(source, out, mini, engine=none).rows == 0
    assert out.read_bytes() == before


@pytest.mark.parametrize("torn", [b'{"id": "r59", "te', b'{"id": "r0"', b'{"i', b"{", '{"id": "ü'.encode()[:-1]])
def test_a_torn_last_line_is_cut_off(
    source: Path, mini: Path, tmp_path: Path, whole: dict[Any, str], torn: bytes
) -> None:
    out = tmp_path / "whole.jsonl"
    kept = out.read_bytes().splitlines(keepends=True)[:30]
    out.write_bytes(b"".join(kept) + torn)
    assert run_echo(source, out, mini).rows == COUNT - 30
    assert texts(out) == whole
    out.write_bytes(torn)  # nothing but half a row
    assert run_echo(source, out, mini).rows == COUNT
    assert texts(out) == whole


def test_a_file_of_somebody_else_is_left_as_it_is(source: Path, mini: Path, tmp_path: Path) -> None:
    for content in (b"my notes\nwithout a last line break", b'[{"id": 1}]\n'):
        (tmp_path / "notes").write_bytes(content)
        with pytest.raises(RequestError, match="holds something else than rows"):
            run_echo(source, tmp_path / "notes", mini)
        assert (tmp_path / "notes").read_bytes() == content


def test_a_broken_line_in_the_middle_is_named(source: Path, mini: Path, tmp_path: Path, whole: dict[Any, str]) -> None:
    out = tmp_path / "whole.jsonl"
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([*lines[:3], b"\0" * 40 + b"\n", *lines[3:]]))
    with pytest.raises(RequestError, match="line 4 is no row"):
        run_echo(source, out, mini)


def test_a_second_job_on_one_output_is_refused(source: Path, mini: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Journal(out), pytest.raises(RequestError, match="another job is writing it"):
        run_echo(source, out, mini)
    assert run_echo(source, out, mini).rows == COUNT


def test_a_file_system_without_locks_is_refused(
    source: Path, mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(
        RequestError, match=r"out\.jsonl: cannot be locked \(Function not implemented\); expected a file"
    ):
        run_echo(source, tmp_path / "out.jsonl", mini)


def test_another_job_does_not_mix_with_an_output(source: Path, mini: Path, mini_copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run_echo(source, out, mini)
    config = json.loads((mini_copy / "preprocessor_config.json").read_text())
    (mini_copy / "preprocessor_config.json").write_text(json.dumps(config | {"image_mean": [0.4, 0.5, 0.5]}))
    for checkpoint, options, part in (
        (mini_copy, {}, "checkpoint"),
        (mini, {"question": "What is <Prompt0>?"}, 'question null, now it is "What is <Prompt0>\\?"'),
        (mini, {"max_num_tiles": 2}, "max_num_tiles 16, now it is 2"),
        (mini, {"group": 2}, "group 1, now it is 2"),
        (mini, {"max_tokens": 9}, "max_tokens 3, now it is 9"),
    ):
        with pytest.raises(RequestError, match=f"was begun with {part}"):
            run_echo(source, out, checkpoint, **options)
    (tmp_path / "out.jsonl.job.json").unlink()
    with pytest.raises(RequestError, match=r"job\.json: missing or broken"):
        run_echo(source, out, mini)
    assert run_echo(source, out, mini, max_tokens=9, mix=True).rows == 0
    assert run_echo(source, out, mini, max_tokens=9).rows == 0


@pytest.mark.parametrize(
    "change", [{"image": "3.png"}, {"regions": [[0, 0, 50, 50]]}, {"question": "What colour is <Prompt0>?"}]
)
def test_an_input_that_changed_under_its_ids_is_refused(mini: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    source, out = write_requests(tmp_path, 12), tmp_path / "out.jsonl"
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    run_echo(write_lines(source, list(lines[:8])), out, mini)
    before = out.read_bytes()
    lines[5] |= change
    write_lines(source, list(lines))
    with pytest.raises(RequestError, match="line 6: id 'r5' was answered before for another image, other regions or"):
        run_echo(source, out, mini)
    assert out.read_bytes() == before
    assert run_echo(source, out, mini, mix=True).rows == 4
    kept = rows(out)[:8]
    assert len(rows(out)) == 12
    for row in kept:  # rows of an older version have no digest, and are gone on with
        del row["request"]
    write_lines(out, list(kept))
    assert run_echo(source, out, mini).rows == 4
    assert texts(out).keys() == {f"r{i}" for i in range(12)}


def test_a_data_set_that_was_moved_is_gone_on_with(mini: Path, tmp_path: Path) -> None:
    source = write_requests(tmp_path, 12)
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join(lines[:8]))
    run_echo(source, tmp_path / "out.jsonl", mini)
    moved = Path(shutil.copytree(tmp_path, tmp_path / "elsewhere"))
    (moved / "in.jsonl").write_text("".join(lines))
    assert run_echo(moved / "in.jsonl", tmp_path / "out.jsonl", mini).rows == 4


def test_a_changed_input_stops_a_job_that_has_begun(mini: Path, tmp_path: Path) -> None:
    """An answered id that comes after unanswered ones: what was answered until then stays."""
    source, out, stop = write_requests(tmp_path, 1200), tmp_path / "out.jsonl", Stop()
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    write_lines(source, list(lines[-1:]))
    run_echo(source, out, mini)
    lines[-1]["regions"] = [[0, 0, 50, 50]]
    write_lines(source, list(lines))
    run_echo(source, out, mini, stop=stop)
    assert "line 1200: id 'r1199' was answered before" in str(stop.reason)
    assert 1 < len(texts(out)) < 1200


def test_ids_that_come_twice_are_answered_once(mini: Path, tmp_path: Path) -> None:
    source = write_requests(tmp_path, 6)
    lines = source.read_text().splitlines()
    source.write_text("\n".join([*lines, lines[2], lines[2], "{", lines[0].replace('"r0"', "0")]))
    for _ in range(2):
        run_echo(source, tmp_path / "out.jsonl", mini)
        found = {row["id"]: row for row in rows(tmp_path / "out.jsonl")}
        assert len(rows(tmp_path / "out.jsonl")) == len(found) == 10
    assert {name for name, row in found.items() if "error" in row} == {"line-7", "line-8", "line-9"}
    assert found["line-7"]["error"] == "id: 'r2' came up before in this input"


def test_images_that_are_missing_or_deleted_in_mid_run(mini: Path, tmp_path: Path) -> None:
    source = write_requests(tmp_path, 40, images=40)
    (tmp_path / "3.png").unlink()

    class Deleting(EchoBackend):
        def submit(self, *arguments: Any) -> Any:
            (tmp_path / "39.png").unlink(missing_ok=True)
            return super().submit(*arguments)

    totals = run_echo(source, tmp_path / "out.jsonl", mini, backend=Deleting())
    found = {row["id"]: row for row in rows(tmp_path / "out.jsonl")}
    assert (totals.rows, totals.errors) == (40, 2)
    for name in ("r3", "r39"):
        assert found[name]["error"].endswith(f"{name[1:]}.png: no such file")
        assert found[name]["image"].endswith(f"{name[1:]}.png")
    shutil.copy(tmp_path / "2.png", tmp_path / "3.png")
    totals = run_echo(source, tmp_path / "out.jsonl", mini, retry_errors=True)
    assert (totals.before, totals.rows, totals.errors) == (38, 2, 1)
    assert len(rows(tmp_path / "out.jsonl")) == 40


@pytest.mark.parametrize("filters", [{"limit": 6}, {"ids": frozenset({"r1", "r2"})}, {"shard": Shard(0, 2)}])
def test_errors_outside_the_filters_stay(mini: Path, tmp_path: Path, filters: dict[str, Any]) -> None:
    """What is not asked again keeps its row."""
    source, out = write_requests(tmp_path, 12, images=12), tmp_path / "out.jsonl"
    for number in range(1, 12, 2):
        (tmp_path / f"{number}.png").rename(tmp_path / f"{number}.gone")
    assert run_echo(source, out, mini).errors == 6
    for number in range(1, 12, 2):
        (tmp_path / f"{number}.gone").rename(tmp_path / f"{number}.png")
    chosen = {"limit": {"r1", "r3", "r5"}, "ids": {"r1"}}.get(next(iter(filters)))
    totals = run_echo(source, out, mini, retry_errors=True, filters=Filters(**filters))
    found = {row["id"]: row for row in rows(out)}
    assert len(rows(out)) == len(found) == 12
    assert (totals.errors, totals.errors_before) == (0, 6 - totals.rows)
    assert 0 < totals.rows < 6
    answered = {name for name in found if "error" not in found[name]} - {f"r{i}" for i in range(0, 12, 2)}
    assert len(answered) == totals.rows
    assert chosen in (None, answered)


def test_errors_are_asked_again_behind_a_link(mini: Path, tmp_path: Path) -> None:
    source, real = write_requests(tmp_path, 8, images=8), tmp_path / "elsewhere" / "real.jsonl"
    real.parent.mkdir()
    (tmp_path / "3.png").rename(tmp_path / "3.gone")
    (tmp_path / "out.jsonl").symlink_to(real)
    assert run_echo(source, tmp_path / "out.jsonl", mini).errors == 1
    (tmp_path / "3.gone").rename(tmp_path / "3.png")
    assert run_echo(source, tmp_path / "out.jsonl", mini, retry_errors=True).rows == 1
    assert (tmp_path / "out.jsonl").is_symlink()
    assert len(texts(real)) == 8


def test_ids_from_an_editor_that_marks_its_files(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("r1\nr2\n", encoding="utf-8-sig")
    assert _filters(None, None, None, tmp_path / "ids.txt", None, None).ids == {"r1", "r2"}


def test_annotations_without_area_and_of_another_size(mini: Path, tmp_path: Path, picture: Any) -> None:
    from PIL import Image

    Image.fromarray(picture).save(tmp_path / "a.png")
    shapes = [
        [[5, 5, 5, 5, 5, 5]],
        encoded(picture[:50, :60, 0] > 0),
        encoded(picture[..., 0] > 999),
        [[1, 1, 90, 1, 90, 60]],
    ]
    data = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"id": i, "image_id": 1, "segmentation": shape} for i, shape in enumerate(shapes)],
    }
    (tmp_path / "c.json").write_text(json.dumps(data))
    run_echo(tmp_path / "c.json", tmp_path / "out.jsonl", mini)
    found = {row["id"]: row.get("error", "") for row in rows(tmp_path / "out.jsonl")}
    assert "covers no pixel" in found[0]
    assert "rle: size: expected the image's [height, width] [90, 140]" in found[1]
    assert "covers no pixel" in found[2]
    assert found[3] == ""


def test_outputs_that_cannot_be_written(source: Path, mini: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for output, part in (
        (tmp_path / "no" / "out.jsonl", "no such folder"),
        (tmp_path / "folder", "is no regular file"),
        (Path("/dev/full"), "is no regular file"),
        (source, "is the input itself"),
        (Path("/proc/out.jsonl"), "cannot be written"),
    ):
        with pytest.raises(RequestError, match=part):
            run_echo(source, output, mini)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=16k") != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here ({os.strerror(ctypes.get_errno())})")
    yield folder
    libc.umount2(bytes(folder), 2)


def test_a_full_disk_stops_the_job_and_loses_nothing(
    source: Path, mini: Path, small_disk: Path, whole: dict[Any, str]
) -> None:
    out, stop = small_disk / "out.jsonl", Stop()
    first = run_echo(source, out, mini, stop=stop)
    assert "No space left on device" in str(stop.reason)
    assert 0 < len(rows(out)) == first.rows < COUNT
    ctypes.CDLL(None).mount(b"tmpfs", bytes(small_disk), b"tmpfs", 32, b"size=1m")  # MS_REMOUNT: there is room again
    assert run_echo(source, out, mini).rows == COUNT - first.rows
    assert texts(out) == whole


def test_errors_of_writing_leave_a_whole_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(tmp_path / "out.jsonl") as journal:
        journal.append({"id": 1, "text": "a"})
        real, calls = os.write, []

        def half(file: int, content: bytes) -> int:
            calls.append(1)
            if len(calls) > 1:
                raise OSError(28, "No space left on device")
            return real(file, content[: len(content) // 2])

        monkeypatch.setattr(os, "write", half)
        with pytest.raises(OutputError, match="No space left"):
            journal.append({"id": 2, "text": "b" * 100})
        monkeypatch.undo()
        journal.append({"id": 3, "text": "c"})
    assert [row["id"] for row in read_rows(tmp_path / "out.jsonl")] == [1, 3]


def test_an_engine_that_dies_is_replaced(source: Path, mini: Path, tmp_path: Path, whole: dict[Any, str]) -> None:
    out, stop = tmp_path / "out.jsonl", Stop()
    backends = iter([EchoBackend(dies_after=20), EchoBackend(dies_after=7), EchoBackend()])
    totals = run_echo(source, out, mini, stop=stop, engine=lambda: echo_engine(mini, next(backends)))
    assert (stop.reason, totals.engine_restarts) == (None, 2)
    assert texts(out) == whole


def test_an_engine_that_keeps_dying_stops_the_job(
    source: Path, mini: Path, tmp_path: Path, whole: dict[Any, str]
) -> None:
    out, stop = tmp_path / "out.jsonl", Stop()
    first = run_echo(
        source, out, mini, stop=stop, restarts=1, engine=lambda: echo_engine(mini, EchoBackend(dies_after=9))
    )
    assert str(stop.reason).startswith("the engine died: the engine has stopped")
    assert first.rows == 18
    assert run_echo(source, out, mini).rows == COUNT - 18
    assert texts(out) == whole


def test_room_ahead_of_the_engine_does_not_grow_when_engines_die(source: Path, mini: Path, tmp_path: Path) -> None:
    class Silent(EchoBackend):
        """Dies with everything that it was given in flight."""

        def submit(self, prepared: Any, sampling: Any, on_report: Any) -> Any:
            self.submitted += 1
            if self.submitted == 30:
                on_report(GarserveError("the engine has stopped"))
            return lambda: None

    plan = plan_of(source, tmp_path / "out.jsonl", mini)
    given, back = [], []
    feeder = Feeder.taken
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Feeder, "taken", lambda self: (back.append(1), feeder(self))[1])
        patch.setattr(Job, "_arrived", lambda self, *one, whole=Job._arrived: (given.append(1), whole(self, *one))[1])
        backends = iter([Silent(), EchoBackend()])
        totals = run_job(plan, lambda: echo_engine(mini, next(backends)))
    assert (totals.engine_restarts, totals.rows) == (1, COUNT)
    assert len(back) == len(given)


def test_too_many_errors_stop_the_job(mini: Path, tmp_path: Path) -> None:
    source = write_requests(tmp_path, 30, images=30)
    for number in range(0, 30, 2):
        (tmp_path / f"{number}.png").unlink()
    stop = Stop()
    totals = run_echo(source, tmp_path / "out.jsonl", mini, stop=stop, max_errors=3)
    assert stop.reason == "more than 3 errors (--max-errors)"
    assert totals.errors == 4
    assert len(rows(tmp_path / "out.jsonl")) == totals.rows < 30


def test_errors_that_come_after_the_one_too_many_are_left(mini: Path) -> None:
    """Of the same picture or of the next, while the engine finishes what it has."""

    class Rows(list[dict[str, Any]]):
        def sync(self, *, force: bool = True) -> None:
            pass

    written = Rows()
    job = Job(lambda: echo_engine(mini), written, limits=Limits(max_errors=1))
    job._feeder = SimpleNamespace(taken=lambda: None)  # type: ignore[assignment]
    bundle = Bundle(tuple(Record(f"line {number}") for number in range(4)), (True,) * 4)
    for _ in range(2):
        job._arrived(bundle, Parcel(np.zeros(0, np.uint8), errors=dict.fromkeys(range(4), "bad")))
    assert [row["id"] for row in written] == ["line-0", "line-1"]
    assert job.stop.halt is Halt.drain


def test_groups_share_one_mask_and_say_so(source: Path, mini: Path, tmp_path: Path) -> None:
    """K = 4 makes one image item for four regions; a bad region is left out of its group's mask."""
    lines = [json.loads(line) for line in source.read_text().splitlines()][:8]
    boxes = [[i % 4 * 22, i // 4 * 20, i % 4 * 22 + 15, i // 4 * 20 + 15] for i in range(8)]
    lines = [line | {"image": "0.png", "regions": [box]} for line, box in zip(lines, boxes, strict=True)]
    lines.insert(2, {"id": "bad", "image": "0.png", "regions": [{"box": [500, 500, 510, 510]}]})
    lines.insert(3, {"id": "own", "image": "0.png", "regions": [[1, 1, 9, 9], [2, 2, 8, 8]], "question": "Both?"})
    seen: dict[str, int] = {}

    class Counting(EchoBackend):
        def submit(self, prepared: Any, *arguments: Any) -> Any:
            seen[prepared.items[0].hash] = seen.get(prepared.items[0].hash, 0) + 1
            return super().submit(prepared, *arguments)

    totals = run_echo(
        write_lines(tmp_path / "g.jsonl", list(lines)),
        tmp_path / "g.out",
        mini,
        group=4,
        group_gap=0.0,
        backend=Counting(),
    )
    assert sorted(seen.values()) == [1, 4, 4]
    assert totals.forms == {"group of 4": 8, "several": 1}
    assert {row["form"] for row in rows(tmp_path / "g.out") if "error" not in row} == {"group of 4", "several"}
    alike = [lines[0] | {"id": str(i)} for i in range(3)]  # regions that overlap do not share a mask
    totals = run_echo(write_lines(tmp_path / "h.jsonl", list(alike)), tmp_path / "h.out", mini, group=4, group_gap=0.0)
    assert totals.forms == {"group of 1": 3}


def test_regions_of_a_group_lie_apart(source: Path, mini: Path, tmp_path: Path) -> None:
    """The largest comes first; a neighbour within the gap goes to another group."""
    boxes = {"small": [70, 0, 80, 10], "near": [32, 0, 50, 20], "large": [0, 0, 30, 30], "far": [70, 40, 90, 60]}
    lines = [{"id": name, "image": "0.png", "regions": [box]} for name, box in boxes.items()]
    forms = {}
    for gap in (0.0, 0.1, 0.6):
        out = tmp_path / f"{gap}.out"
        run_echo(write_lines(tmp_path / "g.jsonl", list(lines)), out, mini, group=4, group_gap=gap)
        forms[gap] = {row["id"]: row["form"] for row in rows(out)}
    assert set(forms[0.0].values()) == {"group of 4"}
    three, one = "group of 3", "group of 1"
    assert forms[0.1] == {"large": three, "far": three, "small": three, "near": one}
    assert set(forms[0.6].values()) == {one}
    with pytest.raises(RequestError, match=r"was begun with group_gap 0\.6, now it is 0\.1"):
        run_echo(tmp_path / "g.jsonl", out, mini, group=4)


def bundles(folder: Path, count: int) -> Iterator[Bundle]:
    for number in range(count):
        path = str(folder / f"{number % 4}.png")
        yield Bundle((Record(f"line {number}", number, path, path, ([1, 1, 30, 30],)),), (True,))


def test_workers_prepare_as_this_process_does(source: Path, mini: Path, tmp_path: Path) -> None:
    """Also where three regions share a mask."""
    run_echo(source, tmp_path / "here.jsonl", mini, group=3)
    run_echo(source, tmp_path / "workers.jsonl", mini, group=3, workers=1)
    assert texts(tmp_path / "here.jsonl") == texts(tmp_path / "workers.jsonl")


def test_a_worker_that_is_killed_costs_nothing(source: Path, mini: Path, tmp_path: Path) -> None:
    with WorkerPool(Preparation(str(mini)), 2) as pool:
        found = []
        for bundle, parcel in pool.parcels(bundles(tmp_path, 40)):
            found.append(bundle.records[0].id)
            assert parcel.errors == {}
            if len(found) in (3, 9):
                pid = pool.pids[1]
                os.kill(pid, signal.SIGKILL)
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead by now; the pool is to find it so
        assert sorted(found) == list(range(40))  # type: ignore[type-var]
        assert pool.deaths == 2


def test_a_record_that_no_worker_can_be_told_becomes_an_error(source: Path, mini: Path, tmp_path: Path) -> None:
    def odd() -> Iterator[Bundle]:
        for bundle in bundles(tmp_path, 12):
            record = bundle.records[0]
            region = ([Decimal(1), 1, 30, 30],) if record.id == 5 else record.regions  # as Parquet may have it
            yield Bundle((replace(record, regions=region),), (True,))

    with WorkerPool(Preparation(str(mini)), 1) as pool:
        for _ in range(2):
            parcels = {bundle.records[0].id: parcel for bundle, parcel in pool.parcels(odd())}
            assert sorted(parcels) == list(range(12))  # type: ignore[type-var]
            assert {key for key, parcel in parcels.items() if parcel.errors} == {5}
            assert "cannot be handed to a worker" in parcels[5].errors[0]


def test_workers_of_a_caller_that_failed_do_not_answer_the_next_one(
    source: Path, mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(connection: Any) -> Any:
        raise MemoryError

    with WorkerPool(Preparation(str(mini)), 2) as pool:
        with monkeypatch.context() as patch:
            patch.setattr("garserve.batch.pool.receive_parcel", no_memory)
            with pytest.raises(MemoryError):
                list(pool.parcels(bundles(tmp_path, 12)))
        parcels = {bundle.records[0].id: parcel for bundle, parcel in pool.parcels(bundles(tmp_path, 5))}
    assert sorted(parcels) == list(range(5))  # type: ignore[type-var]
    assert not any(parcel.errors for parcel in parcels.values())


DYING = """
import os, signal, sys
from garserve.batch import prepare
whole = prepare.Preparer.__call__
def call(self, bundle):
    if bundle.records[0].id == 5:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
    return whole(self, bundle)
prepare.Preparer.__call__ = call
from garserve.batch.worker import main
main()
"""


def test_a_record_that_kills_workers_becomes_an_error(source: Path, mini: Path, tmp_path: Path) -> None:
    with WorkerPool(Preparation(str(mini)), 2, command=[sys.executable, "-c", DYING]) as pool:
        parcels = {bundle.records[0].id: parcel for bundle, parcel in pool.parcels(bundles(tmp_path, 12))}
        assert sorted(parcels) == list(range(12))  # type: ignore[type-var]
        assert {key for key, parcel in parcels.items() if parcel.errors} == {5}
        assert parcels[5].errors[0] == "the worker that prepared it died (killed by signal 9; out of memory?)"
        assert pool.deaths == 3


def together(folder: Path, numbers: range) -> Bundle:
    """Return a bundle of one image."""
    path = str(folder / "0.png")
    return Bundle(
        tuple(Record(f"line {number}", number, path, path, ([1, 1, 30, 30],)) for number in numbers),
        (True,) * len(numbers),
    )


LIGHT = """
import json, os, signal, sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[-1]))
connection.recv_bytes()
while True:
    try:
        ids = [record["id"] for record in json.loads(connection.recv_bytes())["records"]]
    except EOFError:
        break
    if any(number == 5 or number >= 100 for number in ids):
        os.kill(os.getpid(), signal.SIGKILL)
    for message in sys.argv[1:-1]:
        connection.send_bytes(bytes.fromhex(message))
"""


def light_pool(mini: Path) -> WorkerPool:
    """Return a pool of one worker that prepares nothing, starts at once, and is killed by 5 and by all from 100 on."""
    empty = Parcel(np.zeros((0, 3, 1, 1), np.uint8)).to_messages()
    command = [sys.executable, "-c", LIGHT, *(bytes(message).hex() for message in empty)]
    return WorkerPool(Preparation(str(mini)), 1, command=command)


def test_a_record_that_kills_workers_costs_no_other(mini: Path, tmp_path: Path) -> None:
    """Neither the ones of its image nor, where all of an image kill, the job."""
    with light_pool(mini) as pool:
        given = iter(
            [together(tmp_path, range(8)), together(tmp_path, range(100, 112)), together(tmp_path, range(8, 10))]
        )
        errors: dict[Any, str | None] = {}
        for bundle, parcel in pool.parcels(given):
            errors |= {record.id: parcel.errors.get(place) for place, record in enumerate(bundle.records)}
        deaths = pool.deaths
    assert sorted(errors) == [*range(10), *range(100, 112)]
    assert {key for key, error in errors.items() if error} == {5, *range(100, 112)}
    assert deaths == 3 + 3 + 3 + 3  # whole, and its killer; whole, and three of its records


def test_only_deaths_in_a_row_end_a_job(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("garserve.batch.pool._DEATHS_IN_ROW", 3)
    monkeypatch.setattr("garserve.batch.pool._DEATHS_A_WORKER", 0)
    with light_pool(mini) as pool:
        given = [together(tmp_path, range(number, number + 1)) for number in (5, 0, 100, 1)]
        assert len(list(pool.parcels(iter(given)))) == 4
        assert pool.deaths == 6
        with pytest.raises(GarserveError, match=r"workers keep dying \(4 times in a row, exit code -9\)"):
            list(pool.parcels(together(tmp_path, range(number, number + 1)) for number in (100, 101)))


def test_a_record_that_no_worker_can_be_told_costs_no_other(source: Path, mini: Path, tmp_path: Path) -> None:
    bundle = together(tmp_path, range(4))
    odd = replace(bundle.records[2], regions=([Decimal(1), 1, 30, 30],))
    bundle = Bundle((*bundle.records[:2], odd, bundle.records[3]), bundle.wanted)
    with WorkerPool(Preparation(str(mini)), 1) as pool:
        parcels = {one.records[0].id: parcel for one, parcel in pool.parcels(iter([bundle]))}
    assert {key for key, parcel in parcels.items() if parcel.errors} == {2}
    assert sorted(parcels) == [0, 1, 2, 3]  # type: ignore[type-var]


def test_workers_import_nothing_from_the_folder_of_the_data(
    source: Path, mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("secrets", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the data was run')")
    monkeypatch.chdir(tmp_path)
    with WorkerPool(Preparation(str(mini)), 1) as pool:
        assert [parcel.errors for _, parcel in pool.parcels(bundles(tmp_path, 2))] == [{}, {}]
        assert pool.deaths == 0


@pytest.mark.parametrize("group", [1, 3])
def test_what_fails_after_the_regions_are_drawn_is_the_records_error(
    source: Path, mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    bundle = together(tmp_path, range(3))
    boxes = [[0, 0, 10, 10], [40, 0, 50, 10], [0, 40, 10, 50]]
    records = [replace(one, regions=(box,)) for one, box in zip(bundle.records, boxes, strict=True)]
    tiling, calls = Processor.prepare, []

    def no_memory(self: Processor, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return tiling(self, *arguments)

    monkeypatch.setattr(Processor, "prepare", no_memory)
    parcel = Preparer(Preparation(str(mini), group=group))(Bundle(tuple(records), bundle.wanted))
    (failed,) = parcel.errors
    assert parcel.errors[failed] == "out of memory while it was prepared"
    assert {entry.record for entry in parcel.entries} == {0, 1, 2} - {failed}
    assert all(parcel.prepared(entry).items for entry in parcel.entries)


class Answered:
    """A source that notes each record as answered; from the tenth on it goes on when a feeder was told to stop."""

    def __init__(self, ledger: Ledger) -> None:
        self.path, self.total, self.read = Path("in"), None, 0
        self._ledger = ledger
        self.reached, self.told = threading.Event(), threading.Event()

    def records(self) -> Iterator[Record]:
        for number in range(2000):
            if number == 10:
                self.reached.set()
                self.told.wait()
            self.read += 1
            self._ledger.note({"id": number})
            yield Record(f"line {number}", number, "a.png", "a.png", ([1, 1, 9, 9],))


def stopping(mini: Path, source: Answered, ledger: Ledger, pool: WorkerPool) -> threading.Thread:
    """Return the thread that tells a feeder to stop while its source waits."""
    feeder = Feeder(Selection(source, Filters()), ledger, pool, Job(lambda: echo_engine(mini), []).events)  # type: ignore[arg-type]
    feeder.start()
    source.reached.wait()
    thread = threading.Thread(target=feeder.stop)
    thread.start()
    feeder._stopped.wait()
    return thread


def test_a_job_that_is_stopped_reads_no_further_record(mini: Path) -> None:
    """Where all are answered, nothing else would end it."""
    ledger = Ledger()
    source = Answered(ledger)
    with WorkerPool(Preparation(str(mini)), 0) as pool:
        thread = stopping(mini, source, ledger, pool)
        source.told.set()
        thread.join()
    assert source.read == 11


def test_a_job_that_is_stopped_does_not_wait_for_the_first_record(mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("garserve.batch.feeder._JOIN_SECONDS", 0.01)
    ledger = Ledger()
    source = Answered(ledger)
    with WorkerPool(Preparation(str(mini)), 0) as pool:
        thread = stopping(mini, source, ledger, pool)
        thread.join(60)
        over = not thread.is_alive()
        source.told.set()
        thread.join()
    assert over


def interrupt(times: int) -> None:
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_twice_while_an_engine_loads(source: Path, mini: Path, tmp_path: Path) -> None:
    stop, loaded = Stop(), []

    def load() -> Any:
        interrupt(2)
        loaded.append(True)
        return echo_engine(mini)

    with _signals(stop):
        run_echo(source, tmp_path / "out.jsonl", mini, stop=stop, engine=load)
        raise AssertionError("the job went on")
    assert (stop.halt, stop.reason, loaded) == (Halt.now, "interrupted", [])
    assert run_echo(source, tmp_path / "out.jsonl", mini).rows == COUNT


def test_the_command_that_is_interrupted_while_an_engine_loads(
    source: Path, mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        interrupt(times)
        return echo_engine(mini)

    monkeypatch.setattr("garserve.cli_batch.load_engine", load)
    paths = ["-i", source, "-o", tmp_path / "out.jsonl", "-c", mini, "--metrics-file", tmp_path / "m.json"]
    told = ["batch", *map(str, paths), "--workers", "0", "--max-tokens", "3", "--json"]
    for times, code, answered in ((2, 130, 0), (1, 130, 0), (0, 0, COUNT)):
        result = CliRunner().invoke(app, told, catch_exceptions=False)
        numbers = json.loads(result.stdout)
        assert (result.exit_code, numbers["rows"]) == (code, answered)
        assert numbers["stopped"] == ("interrupted" if times else None)
        assert numbers == json.loads((tmp_path / "m.json").read_text())
    assert len(texts(tmp_path / "out.jsonl")) == COUNT


def test_ctrl_c_twice_while_requests_run(source: Path, mini: Path, tmp_path: Path) -> None:
    class Interrupting(EchoBackend):
        def submit(self, *arguments: Any) -> Any:
            interrupt(2 * (self.submitted == 10))
            return super().submit(*arguments)

    stop = Stop()
    with _signals(stop):
        totals = run_echo(source, tmp_path / "out.jsonl", mini, stop=stop, backend=Interrupting())
    assert (stop.halt, stop.reason) == (Halt.now, "interrupted")
    assert totals.rows == len(rows(tmp_path / "out.jsonl")) < COUNT


def test_the_engine_is_never_given_more_than_it_has_room_for(source: Path, mini: Path, tmp_path: Path) -> None:
    most = [0, 0]

    class Room(EchoBackend):
        """Answers later, from another thread, and counts what it has at a time."""

        def __init__(self) -> None:
            super().__init__()
            self.tokens: dict[int, int] = {}
            self.guard = threading.Lock()

        def submit(self, prepared: Any, sampling: Any, on_report: Any) -> Any:
            with self.guard:
                self.tokens[id(prepared)] = len(prepared.token_ids) + sampling.max_tokens
                most[0], most[1] = max(most[0], len(self.tokens)), max(most[1], sum(self.tokens.values()))

            def answer() -> None:
                with self.guard:
                    del self.tokens[id(prepared)]
                EchoBackend.submit(self, prepared, sampling, on_report)

            threading.Timer(0.05, answer).start()
            return lambda: None

        def token_room(self) -> int:
            return 4000

        def tile_counts(self) -> TileCounts:
            return TileCounts()

    run_echo(source, tmp_path / "out.jsonl", mini, backend=Room(), in_flight=50)
    assert 1 < most[0] <= 50
    assert 1000 < most[1] <= 4000
    run_echo(source, tmp_path / "few.jsonl", mini, backend=Room(), in_flight=2)
    assert texts(tmp_path / "few.jsonl") == texts(tmp_path / "out.jsonl")
