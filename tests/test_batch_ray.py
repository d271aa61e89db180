"""`--ray`: the same job on a cluster, here one of this machine with two engines of the reference."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import garserve
from garserve.batch.filters import Filters, Shard
from garserve.batch.identity import check_job
from garserve.batch.journal import read_rows
from garserve.batch.ledger import Ledger
from garserve.batch.limits import Halt, Stop
from garserve.batch.parts import Parts, read_manifest
from garserve.batch.ray_cluster import Engines
from garserve.batch.ray_input import Control
from garserve.batch.ray_job import RayJob
from garserve.batch.record import Record
from garserve.batch.run import Plan, run_job
from garserve.batch.source import Reading
from garserve.errors import GarserveError, RequestError
from tests.batch_data import plan_of, rows, write_requests
from tests.echo import shared

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (pip install garserve[ray])")
COUNT, BEFORE = 160, 30


def ray_job(plan: Plan, **options: Any) -> RayJob:
    engines = Engines("local", count=2, cpus=1, gpus=0)
    checkpoint = plan.preparation.folder
    return RayJob(plan, checkpoint, "reference", {"max_num_tiles": 1}, engines, rows_a_part=50, **options)


def when(happened: Callable[[], bool], act: Callable[[], None]) -> None:
    """Act from a thread as soon as something has happened."""

    def wait() -> None:
        while not happened():
            time.sleep(0.005)
        act()

    threading.Thread(target=wait, daemon=True).start()


@needs_ray
def test_a_job_that_is_stopped_and_loses_an_engine(mini: Path, tmp_path: Path) -> None:
    """Begun elsewhere, drained, gone on with, an actor killed: each id once, and the texts of a plain run."""
    options: dict[str, Any] = {"max_num_tiles": 1, "max_tokens": 2, "in_flight": 8}
    source, out = write_requests(tmp_path, COUNT, images=40), tmp_path / "out"
    (tmp_path / "3.png").unlink()
    engine = garserve.load(mini, "reference", max_num_tiles=1)
    run_job(plan_of(source, tmp_path / "whole.jsonl", mini, **options), lambda: shared(engine))
    whole = rows(tmp_path / "whole.jsonl")
    plan = plan_of(source, out, mini, **options)
    with Parts(out, rows_a_part=50) as parts:
        check_job(parts, plan.description(), mix=False)
        for row in whole[:BEFORE]:
            parts.append(row)

    stop = Stop()
    first = ray_job(plan, stop=stop)
    when(lambda: first.totals.rows >= 10, lambda: stop.tell("interrupted", Halt.drain))
    totals = first.run()
    assert (totals.before, stop.reason) == (BEFORE, "interrupted")
    assert 10 <= totals.rows < COUNT - BEFORE
    assert read_manifest(out)["complete"] is False

    second, killed = ray_job(plan), []

    def kill() -> None:
        killed.append(next(iter(second.pids)))
        os.kill(killed[0], signal.SIGKILL)

    when(lambda: second.totals.rows >= 10 and bool(second.pids), kill)
    totals = second.run()
    assert (totals.before, totals.before + totals.rows) == (BEFORE + first.totals.rows, COUNT)
    assert (second.stop.reason, len(killed)) == (None, 1)
    manifest = read_manifest(out)
    assert (manifest["complete"], manifest["rows"], manifest["errors"]) == (True, COUNT, COUNT // 40)
    assert [part["rows"] for part in manifest["parts"]] == [50, 50, 50, 10]
    found = list(read_rows(out))
    assert len(found) == len({row["id"] for row in found}) == COUNT
    said = [{row["id"]: (row.get("text"), row.get("error")) for row in some} for some in (found, whole)]
    assert said[0] == said[1]

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert ray_job(plan).run().rows == 0  # without a cluster: nothing is left
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@needs_ray
@pytest.mark.parametrize("replaced", [False, True])
def test_a_node_that_is_lost(mini: Path, tmp_path: Path, replaced: bool) -> None:
    """Of two nodes with an engine each, one goes with all its processes: every id has its row, from what is left."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 80 << 20}
    source, out = write_requests(tmp_path, COUNT, images=40), tmp_path / "out"
    plan = plan_of(source, out, mini, max_num_tiles=1, max_tokens=2, in_flight=8)
    nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        other = nodes.add_node(**node)
        nodes.wait_for_nodes()
        engines = Engines(nodes.address, count=2, cpus=2, gpus=0)
        job = RayJob(plan, str(mini), "reference", {"max_num_tiles": 1}, engines, rows_a_part=50)
        with ThreadPoolExecutor() as pool:  # a node has to be added by the main thread
            running = pool.submit(job.run)
            while not (job.totals.rows >= 10 and len(job.pids) == 2) and not running.done():
                time.sleep(0.005)
            before = job.totals.rows
            nodes.remove_node(other, allow_graceful=False)
            if replaced:
                nodes.add_node(**node)
            assert before < running.result().rows == COUNT
        assert job.stop.reason is None
    finally:
        nodes.shutdown()
    found = list(read_rows(out))
    assert len(found) == len({row["id"] for row in found}) == COUNT
    assert not [row for row in found if "error" in row]
    assert read_manifest(out)["complete"] is True


@needs_ray
def test_a_job_whose_engines_cannot_be_loaded_stops_and_says_why(mini: Path, tmp_path: Path) -> None:
    source, out = write_requests(tmp_path, 8), tmp_path / "out"
    plan = plan_of(source, out, mini, max_num_tiles=1, max_tokens=2)
    job = RayJob(plan, str(mini), "reference", {"tile_cache_gb": -1.0}, Engines("local", count=2, cpus=1, gpus=0))
    assert job.run().rows == 0
    assert "tile_cache_gb" in str(job.stop.reason)
    assert read_manifest(out)["complete"] is False


def test_engines_are_hopeless_when_none_of_them_starts() -> None:
    control = Control()
    for engine in "ab":
        control.starting(engine)
        control.started(engine)
    assert control.hopeless(2) is None
    control.starting("a")
    control.failed("a", "no memory")
    assert control.hopeless(2) is None  # the other one goes on
    for _ in range(4):  # killed while it loads, again and again
        assert control.hopeless(2) is None
        control.starting("b")
    assert control.hopeless(2) == "no memory"
    control.started("b")
    assert control.hopeless(2) is None
    assert control.hopeless(1) == "no memory"


@needs_ray
def test_what_is_refused_before_a_cluster_is_joined(mini: Path, tmp_path: Path) -> None:
    source = write_requests(tmp_path, 4)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="expected a folder of parts, got a file"):
        ray_job(plan_of(source, tmp_path / "file", mini)).run()
    with pytest.raises(RequestError, match="submit the command to it with `ray job submit`"):
        Engines("ray://head:10001")


@pytest.mark.parametrize("images", [None, Path("elsewhere")])
def test_relative_paths_are_those_of_the_command(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Path | None
) -> None:
    """Ray's processes work in another folder: they find the same files, records and shards."""
    here = tmp_path / "here"
    (here / "elsewhere").mkdir(parents=True)
    requests = write_requests(here, 40, images=40).read_text()
    (here / "in.jsonl").write_text(requests.replace('"image": "', '"image": "../'))
    shutil.copytree(mini, here / "GAR")
    monkeypatch.chdir(here)
    plan = plan_of(
        Path("in.jsonl"), Path("out"), Path("GAR"), reading=Reading(images=images), filters=Filters(shard=Shard(0, 2))
    )
    options = {"vision_model": Path("exported"), "vision_backend": "onnx"}
    job = RayJob(plan, "./GAR", "reference", options, Engines("local"))
    before, description = asked(plan), plan.description()
    monkeypatch.chdir(tmp_path)
    moved = job._plan
    assert 0 < len(before) < 40
    assert asked(moved) == before
    assert moved.output == here / "out"
    assert (job._checkpoint, job._options) == (str(here / "GAR"), {**options, "vision_model": here / "exported"})
    monkeypatch.chdir(here)
    assert moved.description() == description


def asked(plan: Plan) -> list[Record]:
    ledger = Ledger()
    return [record for bundle in plan.selection(plan.open_source()).bundles(ledger) for record in bundle.records]


@pytest.mark.parametrize("name", ["tiny", "owner/name", "~/GAR"])
def test_names_of_checkpoints_that_are_no_paths_stay(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    job = RayJob(plan_of(Path("in.jsonl"), Path("out"), mini), name, "reference", {}, Engines("local"))
    assert job._checkpoint == name


def test_without_ray(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(GarserveError, match=r"--ray needs Ray: pip install 'garserve\[ray\]'"):
        ray_job(plan_of(write_requests(tmp_path, 4), tmp_path / "out", mini)).run()
    assert not (tmp_path / "out").exists()
