"""The scripts of benchmarks/: what they save, what warms everyone up, and what they refuse; nothing is timed."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from garserve.bench.machine import machine
from tests.conftest import ROOT

SIZE = (120, 90)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the benchmarks on the path, as one of its scripts has it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_results_say_where_each_of_them_comes_from(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import machine as results

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks/end_to_end.py", "--rounds", "9", "--save", "/home/some/masks.jsonl"])
    file = results.save("one", {"a": 1}, "here")
    said = json.loads(file.read_text())
    assert said["command"] == "python benchmarks/end_to_end.py --rounds 9 masks.jsonl"
    assert said["versions"]["garserve"]
    assert (said["conditions"], said["machine"], said["figures"]) == ("here", machine(), {"a": 1})

    old = {"conditions": "of old", "machine": {"cpu": "another"}, "figures": {"first": {"command": "its own", "x": 1}}}
    file.with_name("many.json").write_text(json.dumps(old))
    assert results.add("many", "second", {"x": 2}, "of new") == file.with_name("many.json")
    found = json.loads(file.with_name("many.json").read_text())
    assert set(found) == {"figures"}
    kept = {"conditions": "of old", "machine": {"cpu": "another"}, "command": "its own", "x": 1}
    assert found["figures"]["first"] == kept  # as it was, whoever adds
    assert found["figures"]["second"]["conditions"] == "of new"
    assert found["figures"]["second"]["machine"] == machine()
    results.add("many", "second", {"x": 3}, "of new")
    found = json.loads(file.with_name("many.json").read_text())["figures"]
    assert (found["first"], found["second"]["x"]) == (kept, 3)


def test_everyone_is_warmed_up_by_a_round(scripts: None) -> None:
    from end_to_end import Rounds

    def warmed(*plan: Any, least: int) -> int:
        return len(Rounds(*plan).warming(least).requests)

    assert warmed("dense", "tiny", 1, 20, 4, 8, least=8) == 20
    assert warmed("stream", "tiny", 3, 20, 1, 8, least=8) == 3
    first, second = (Rounds("stream", "tiny", 2, 20, 1, 8).asked(number).requests for number in range(2))
    assert not any(np.array_equal(one.image, other.image) for one in first for other in second)


def test_a_peer_answers_whole_groups_and_others_in_each_round(scripts: None) -> None:
    from end_to_end import Side, _taken

    side, starts = Side("careful batch", lambda requests: [], 8), []
    for _ in range(9):
        taken = _taken(side, 20, 4)
        assert taken == list(range(taken[0], taken[0] + 8))
        starts.append(taken[0])
        side.rates.append(1.0)
    assert set(starts) == {0, 4, 8, 12}
    assert _taken(side, 5, 1) == [0, 1, 2, 3, 4]
    assert _taken(Side("garserve", lambda requests: [], None), 20, 4) == list(range(20))


@pytest.mark.parametrize(
    ("kind", "group", "least", "count"), [("dense", 1, 8, 8), ("dense", 4, 1, 4), ("dense", 3, 4, 6)]
)
def test_a_part_of_a_round_warms_the_large_model(
    scripts: None, monkeypatch: pytest.MonkeyPatch, kind: Any, group: int, least: int, count: int
) -> None:
    import end_to_end

    monkeypatch.setitem(end_to_end._SIZES, "GAR-1B", SIZE)
    plan = end_to_end.Rounds(kind, "GAR-1B", 1, 20, group, 8)
    assert len(plan.warming(least).requests) == count


def test_options_of_the_comparison_that_do_nothing_are_refused(scripts: None) -> None:
    from end_to_end import _refuse_ignored

    for model, kind, given, message in (
        ("tiny", "dense", {"depth": 2}, "--depth: expected it with --model GAR-1B"),
        ("tiny", "dense", {"layers": 2}, "--layers: expected it with --model GAR-1B"),
        ("GAR-1B", "stream", {"regions": 3}, "--regions: expected it with --workload dense only, got stream"),
    ):
        options: dict[str, Any] = {"depth": None, "layers": None, "regions": None, **given}
        with pytest.raises(typer.BadParameter, match=message):
            _refuse_ignored(model, kind, **options)
    _refuse_ignored("GAR-1B", "dense", depth=2, layers=1, regions=5)


def test_the_replay_allocates_what_it_writes_as_its_peers_do(scripts: None) -> None:
    from replay import SIDE, Writing

    given: list[torch.Tensor] = []
    run = Writing(given.append, torch.empty(2 * SIDE**2, 3))
    assert run().shape == (2, SIDE**2, 3)
    assert run.poisoned().isnan().all()  # nothing was written
    assert len({rows.data_ptr() for rows in given}) == 2  # kept here, so they are not the same memory


def test_the_load_says_what_it_repeats(scripts: None) -> None:
    pytest.importorskip("aiohttp")
    import load

    assert "60 different requests, each asked before: tile and prefix caches are warm" in load._conditions(64)
    assert load._percentiles([]) == {}
