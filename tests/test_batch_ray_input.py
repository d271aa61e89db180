"""How `--ray` reads its input, and what it makes of a reader that fails: a job with all of Ray's parts but Ray."""

import json
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from garserve.batch import ray_input, ray_job
from garserve.batch.bundles import Bundle
from garserve.batch.journal import part_paths, read_rows
from garserve.batch.limits import Halt, Limits
from garserve.batch.parts import read_manifest
from garserve.batch.prepare import Preparation
from garserve.batch.ray_cluster import Engines, Placement
from garserve.batch.ray_input import Control, pending
from garserve.batch.ray_job import RayJob
from garserve.batch.record import Record
from garserve.batch.run import Plan
from garserve.batch.sources import open_source
from garserve.batch.station import Station
from garserve.batch.temporary import SpaceError
from garserve.batch.wire import read_bundle
from garserve.errors import RequestError
from tests.batch_data import plan_of, write_requests
from tests.echo import echo_engine

COUNT = 12
DIED = "the engine that was asked died, in 3 passes"


class Actor:
    """An actor of this process: every method has a `remote`."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._inner, name))


class Cluster:
    """Does with a pass's packages what Ray does: what goes wrong with one is dropped without a word."""

    def __init__(self, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint = plan.preparation.folder
        self.job = RayJob(plan, checkpoint, "reference", {}, Engines("local"))
        self.passes = 0
        self.lost: set[Any] = set()  # ids whose engine dies
        self.reader_dies = False
        self._plan = plan
        self._station = Station(plan.preparation, lambda: echo_engine(Path(checkpoint)), limits=plan.limits)
        monkeypatch.setattr(ray_job, "ray_module", lambda: SimpleNamespace(get=lambda one: one))
        monkeypatch.setattr(ray_job, "cluster", lambda *_, **__: nullcontext(Placement(1, 1, 0)))
        monkeypatch.setattr(RayJob, "_pipeline", lambda _, *how: self._pipeline(how[-1]))

    def run(self) -> dict[Any, dict[str, Any]]:
        """Run the job, and return the rows by id."""
        try:
            self.job.run()
        finally:
            self._station.close()
        return {row["id"]: row for row in read_rows(self._plan.output)}

    def _pipeline(self, records: int) -> tuple[Any, Any]:
        self.passes += 1
        control = Control()
        known = [(path, path.stat().st_size) for path in part_paths(self._plan.output)]
        packages = pending(self._plan, known, records, control.halted, control.reading_ended)

        def batches(**_: Any) -> Iterator[dict[str, Any]]:
            try:
                for package in packages:
                    bundles = [read_bundle(messages) for messages in package]
                    if self.lost.isdisjoint(record.id for bundle in bundles for record in bundle.records):
                        told = [json.dumps(row).encode() for row in self._station.answer(bundles)]
                        yield {"row": SimpleNamespace(to_pylist=lambda told=told: told)}
                    if self.reader_dies:
                        return
            except Exception:
                return

        return Actor(control), SimpleNamespace(iter_batches=batches)


@pytest.fixture
def plan(mini: Path, tmp_path: Path) -> Plan:
    return plan_of(write_requests(tmp_path, COUNT, images=COUNT), tmp_path / "out", mini, in_flight=8)


def test_everything_is_answered_in_one_pass(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Cluster(plan, monkeypatch)
    found = one.run()
    assert (one.passes, one.job.stop.reason) == (1, None)
    assert len(found) == COUNT
    assert not [row for row in found.values() if "error" in row]


def test_what_engines_die_of_becomes_an_error_row(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Cluster(plan, monkeypatch)
    one.lost = {"r5"}
    found = one.run()
    assert (one.passes, len(found)) == (3, COUNT)
    assert {key: row["error"] for key, row in found.items() if "error" in row} == {"r5": DIED}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error"),
        (SpaceError("temporary space: full"), "temporary space: full"),
    ],
)
@pytest.mark.parametrize("after", [0, 6])
def test_a_reader_that_fails_stops_the_job(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str, after: int
) -> None:
    """What it did not come to has no row: nobody was asked about it."""
    one = Cluster(plan, monkeypatch)
    fail_after(after, error, monkeypatch)
    found = one.run()
    assert one.job.stop.reason == f"the input could not be read on: {told}"
    assert one.passes == 1
    assert len(found) < COUNT
    assert bool(found) == bool(after)
    assert not [row for row in found.values() if "error" in row]
    assert read_manifest(plan.output)["complete"] is False


@pytest.mark.parametrize("after", [0, 6])
def test_an_input_that_the_reader_refuses(plan: Plan, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """As without Ray: an error where nothing was begun, and the end of the job where something was."""
    one = Cluster(plan, monkeypatch)
    fail_after(after, RequestError("the input has changed"), monkeypatch)
    if after:
        assert 0 < len(one.run()) < COUNT
        assert one.job.stop.reason == "the input has changed"
    else:
        with pytest.raises(RequestError, match="the input has changed"):
            one.run()


def fail_after(count: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = ray_input.told_messages, []

    def failing(bundle: Bundle) -> list[bytes]:
        calls.append(bundle)
        if len(calls) > count:
            raise error
        return real(bundle)

    monkeypatch.setattr(ray_input, "told_messages", failing)


def test_a_reader_that_dies_writes_no_error_rows(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, it tells nobody, and what it did not come to is no engine's fault."""
    one = Cluster(plan, monkeypatch)
    one.reader_dies = True
    found = one.run()
    assert one.passes == 3
    assert one.job.stop.reason == "Ray: what reads the input died, in 3 passes"
    assert 0 < len(found) < COUNT
    assert not [row for row in found.values() if "error" in row]


def test_a_pass_that_ends_early_leaves_its_thread_without_a_word(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Cluster(plan, monkeypatch)
    threads: list[threading.Thread] = []
    ended = threading.Event()
    told: list[Any] = []

    def batches(**_: Any) -> Iterator[dict[str, Any]]:
        threads.append(threading.current_thread())
        one.job.stop.tell("enough", Halt.now)
        ended.wait()
        yield {"row": SimpleNamespace(to_pylist=list)}

    dataset = SimpleNamespace(iter_batches=batches)
    monkeypatch.setattr(RayJob, "_pipeline", lambda *_: (Actor(Control()), dataset))
    monkeypatch.setattr(threading, "excepthook", told.append)
    one.run()
    ended.set()
    threads[0].join()
    assert told == []
    assert one.job.stop.reason == "enough"


def test_more_errors_than_allowed_stop_the_job_and_no_engine(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_requests(tmp_path, COUNT, images=COUNT)
    for number in range(COUNT):
        (tmp_path / f"{number}.png").unlink()
    one = Cluster(plan_of(source, tmp_path / "out", mini, in_flight=8, max_errors=2), monkeypatch)
    assert len(one.run()) >= 3
    assert one.job.stop.reason == "more than 2 errors (--max-errors)"


def test_a_station_leaves_errors_to_be_counted_by_others(mini: Path) -> None:
    limits = Limits(in_flight=8, max_errors=1)
    one = Station(Preparation(str(mini)), lambda: echo_engine(mini), limits=limits)
    bundles = [Bundle((Record(f"line {number}", number, error="bad"),), (True,)) for number in range(5)]
    for _ in range(2):
        assert [row["error"] for row in one.answer(bundles)] == ["bad"] * 5
    one.close()


def test_decimals_of_parquet_are_numbers(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install garserve[parquet])")
    import pyarrow.parquet as parquet

    write_requests(tmp_path, 3, images=3)
    box = [Decimal("1.50"), Decimal("2.00"), Decimal("30.25"), Decimal("40.00")]
    regions = arrow.array([[box]] * 3, arrow.list_(arrow.list_(arrow.decimal128(8, 2))))
    source = tmp_path / "in.parquet"
    parquet.write_table(arrow.table({"image": [f"{i}.png" for i in range(3)], "regions": regions}), source)
    for record in open_source(source).records():
        assert json.dumps(record.regions) == "[[1.5, 2.0, 30.25, 40.0]]"
    found = Cluster(plan_of(source, tmp_path / "out", mini), monkeypatch).run()
    assert len(found) == 3
    assert not [row for row in found.values() if "error" in row]


def test_a_record_that_no_json_can_hold_is_one_error_row(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install garserve[parquet])")
    import pyarrow.parquet as parquet

    write_requests(tmp_path, 1)
    regions = [[{"box": [1, 1, 20, 20], "since": datetime(2025, 1, 2) if i == 1 else None}] for i in range(4)]
    source = tmp_path / "in.parquet"
    parquet.write_table(arrow.table({"id": [0, 1, 2, 3], "image": ["0.png"] * 4, "regions": regions}), source)
    one = Cluster(plan_of(source, tmp_path / "out", mini), monkeypatch)
    found = one.run()
    assert (one.passes, one.job.stop.reason, set(found)) == (1, None, {0, 1, 2, 3})
    assert [key for key, row in found.items() if "error" in row] == [1]
    assert "request cannot be handed to another process (TypeError" in found[1]["error"]
