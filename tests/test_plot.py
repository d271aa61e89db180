"""Figures of the benchmarks: every one is drawn from what the benchmarks save, and what is not there is left out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("matplotlib", reason="figures need the extra bench")
MACHINE = {"cpu": "made up", "threads": 3}
RATES = {name: {"regions/s": [2.0, 3.0, 4.0]} for name in ("garserve", "upstream", "careful batch")}


def draw(folder: Path, **results: object) -> str:
    for name, figures in results.items():
        (folder / f"{name}.json").write_text(json.dumps({"machine": MACHINE, "figures": figures}))
    command = [sys.executable, str(ROOT / "benchmarks" / "plot.py"), str(folder), "-o", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_figures(tmp_path: Path) -> None:
    out = draw(
        tmp_path,
        end_to_end={f"tiny, dense of {n}, groups of 1": RATES for n in (1, 20)},
        latency=[{"stage": "vision", "milliseconds": 3.0, "share": 0.7}, {"stage": "TTFT", "milliseconds": 4.0}],
        replay_cpu={f"float32, {n} regions": {"ours": 1.0 * n, "grid_sample": 9.0 * n} for n in (1, 8)},
        tiles_computed={f"16 tiles, {n} regions": {"computed": 1 / n, "five together": 0.5 / n} for n in (1, 5)},
    )
    assert "no " not in out
    for name in ("regions", "latency", "replay", "tiles"):
        assert (tmp_path / f"bench_{name}.png").stat().st_size > 5_000
        assert (tmp_path / f"bench_{name}.svg").is_file()


def test_files_whose_entries_have_a_machine_each(tmp_path: Path) -> None:
    rates = {name: {"answers/s": [2.0, 4.0]} for name in ("garserve", "upstream", "careful batch")}
    entries = {f"tiny, dense of {n}, groups of 1": {"machine": MACHINE, **rates} for n in (1, 20)}
    entries["tiny, dense of 5, groups of 1"] = {"machine": MACHINE, **RATES}  # from an older file
    (tmp_path / "end_to_end.json").write_text(json.dumps({"figures": entries}))
    out = draw(tmp_path)
    assert "bench_regions.png" in out
    drawn = (tmp_path / "bench_regions.svg").read_text()
    assert "made up, 3 threads" in drawn
    assert "authors" in drawn


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    out = draw(tmp_path, tiles_computed={"16 tiles, 1 regions": {"computed": 1.0, "five together": 1.0}})
    assert out.count(": no ") == 3
    assert not (tmp_path / "bench_latency.png").exists()
