"""The scripts of benchmarks/: what they save, what warms everyone up, and what they refuse; nothing is timed."""

import inspect
import json
import re
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from rich.console import Console

import garserve
from garserve.bench.machine import Peaks, machine
from garserve.bench.workload import DENSE
from garserve.checkpoint import TINY, resolve
from tests.conftest import ROOT, write_lines

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
    assert sha256((resolve(TINY) / "model.safetensors").read_bytes()).hexdigest().startswith(said["tiny"])
    assert len(said["tiny"]) == 12
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
    from sides import Side, taken

    side, starts = Side("careful batch", lambda requests: [], 8), []
    for _ in range(9):
        positions = taken(side, 20, 4)
        assert positions == list(range(positions[0], positions[0] + 8))
        starts.append(positions[0])
        side.rates.append(1.0)
    assert set(starts) == {0, 4, 8, 12}
    assert taken(side, 5, 1) == [0, 1, 2, 3, 4]
    assert taken(Side("garserve", lambda requests: [], None), 20, 4) == list(range(20))


def test_the_sizes_of_a_careful_users_batches_are_told(scripts: None) -> None:
    from sides import Side, told

    careful = Side("careful batch", lambda requests: [], 8, 4)
    assert told(careful, 20) == "careful batch 8, in batches of 4 neighbours"
    assert told(careful, 5) == "careful batch 5, in batches of 4 and 1 neighbours"
    assert told(careful, 1) == "careful batch 1, in batches of 1 neighbours"
    assert told(Side("upstream", lambda requests: [], 5, 1), 20) == "upstream 5, one at a time"
    assert told(Side("garserve", lambda requests: [], None), 20) == "garserve 20"


@pytest.mark.parametrize(("group", "batch"), [(1, 4), (2, 4), (3, 6), (4, 4), (5, 5)])
def test_a_careful_users_batch_is_of_whole_groups(scripts: None, group: int, batch: int) -> None:
    from end_to_end import _chosen_batch
    from sides import Side, taken

    assert _chosen_batch(None, group) == batch
    assert _chosen_batch(2 * group, group) == 2 * group
    assert _chosen_batch(0, group) == 0
    side = Side("careful batch", lambda requests: [], -(-5 // batch) * batch, batch)
    for _ in range(9):
        positions = taken(side, 20, group)
        firsts = positions[::batch]
        assert all(first % group == 0 for first in firsts)
        side.rates.append(1.0)
    if group > 1:
        with pytest.raises(typer.BadParameter, match=f"--batch: expected a multiple of --group {group}, .* got 7"):
            _chosen_batch(7, group)


def test_other_conditions_have_another_title(scripts: None) -> None:
    import end_to_end

    usual = {name: option.default for name, option in inspect.signature(end_to_end.main).parameters.items()}

    def title(**given: Any) -> str:
        said = {**usual, "regions": DENSE, **given}
        said["batch"] = end_to_end._chosen_batch(said["batch"], said["group"])
        asked = ("workload", "model", "images", "regions", "group", "max_tokens")
        plan = end_to_end.Rounds(*(said[name] for name in asked))
        rest = {name: said[name] for name in ("peer_regions", "batch", "tile_reuse", "apart")}
        return end_to_end._title(plan, {"depth": said["depth"], "layers": said["layers"]}, **rest)

    others: list[dict[str, Any]] = [
        {"model": "GAR-1B"},
        {"model": "GAR-1B", "depth": 2},
        {"model": "GAR-1B", "layers": 2},
        {"workload": "stream"},
        {"regions": 5},
        {"group": 4},
        {"images": 2},
        {"peer_regions": 1},
        {"batch": 2},
        {"batch": 0},
        {"max_tokens": 8},
        {"tile_reuse": False},
        {"apart": False},
    ]
    assert title() == "tiny, dense of 20, groups of 1"  # as plot.py looks for it
    assert title(group=4, batch=4) == title(group=4) == "tiny, dense of 20, groups of 4"
    assert title(group=3) == "tiny, dense of 20, groups of 3"
    assert len({title(), *(title(**other) for other in others)}) == len(others) + 1


def test_what_is_printed_and_saved_has_its_conditions(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import end_to_end
    import machine as results

    load = garserve.load
    monkeypatch.setattr(garserve, "load", lambda folder, **_: load(folder, "reference", tile_cache_gb=0.1))
    monkeypatch.setattr(end_to_end, "console", Console(record=True, width=200))
    monkeypatch.setattr(end_to_end, "peaks", lambda: Peaks(1e12, 1e10))
    monkeypatch.setitem(end_to_end._SIZES, "tiny", SIZE)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks/end_to_end.py", "--max-tokens", "2"])
    end_to_end.main(regions=1, rounds=1, max_tokens=2, apart=False, save_results=True)
    (file,) = tmp_path.glob("*/end_to_end.json")
    entries = json.loads(file.read_text())["figures"]
    entry = entries["tiny, dense of 1, groups of 1, at most 2 tokens, peers in garserve's process"]
    assert "at most 2 of an answer" in entry["conditions"]
    assert entry["conditions"].endswith(
        "1 requests: garserve 1; upstream 1, one at a time; careful batch 1, in batches of 1 neighbours"
    )
    shown = end_to_end.console.export_text()
    for key in ("conditions", "machine", "versions", "tiny", "command", "tower", "peers", "careful batch", "bound"):
        assert key in entry
        assert re.search(rf"^│ {key} ", shown, re.MULTILINE)
    assert "python benchmarks/end_to_end.py --max-tokens 2" in shown


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


def lying_photograph(folder: Path, masks: int) -> Path:
    """A file with one photograph that lies on its side, and masks in its upright frame beside it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (60, 40)).save(folder / "turned.png", exif=exif)
    values = np.zeros((60, 40), np.uint8)
    for number in range(masks):
        values[4 * number : 4 * number + 3, : 2 * number + 4] = number + 1
    Image.fromarray(values).save(folder / "values.png")
    regions = [{"mask": "values.png", "value": number + 1} for number in range(masks)]
    return write_lines(folder / "masks.jsonl", [{"image": "turned.png", "regions": regions}])


def test_tiles_are_counted_on_upright_pictures_with_masks_beside_the_file(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiles_computed

    file = lying_photograph(tmp_path, 13)
    monkeypatch.chdir("/")
    sizes, masks = tiles_computed._read(file)
    assert sizes == [(60, 40)]
    assert [int(mask.sum()) for mask in masks] == [3 * (2 * number + 4) for number in range(13)]


def test_too_few_masks_give_no_shares(scripts: None, tmp_path: Path) -> None:
    import tiles_computed

    with pytest.raises(SystemExit, match="expected at least 13 regions, 50 with their mirrors, got 12: no figures"):
        tiles_computed.main(lying_photograph(tmp_path, 12), save_results=False)
    with pytest.raises(SystemExit, match=r"line 1: .*none\.png: no such file"):
        tiles_computed.main(write_lines(tmp_path / "bad.jsonl", [{"image": "none.png", "regions": [[1, 1, 9, 9]]}]))


def test_the_replay_allocates_what_it_writes_as_its_peers_do(scripts: None) -> None:
    from replay import SIDE, Writing

    given: list[torch.Tensor] = []
    run = Writing(given.append, torch.empty(2 * SIDE**2, 3))
    assert run().shape == (2, SIDE**2, 3)
    assert run.poisoned().isnan().all()  # nothing was written
    assert len({rows.data_ptr() for rows in given}) == 2  # kept here, so they are not the same memory


def test_every_case_of_the_replay_is_compiled(scripts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import replay

    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(replay, "CHANNELS", 2)
    with torch._dynamo.config.patch(recompile_limit=1):
        for count in (1, 2):
            case = replay.Case.random(count, torch.float32, torch.device("cpu"))
            rows = replay._compiled(case, backend)()
            assert rows.shape == (count, replay.SIDE**2, 2)
    assert len(compiled) == 2
