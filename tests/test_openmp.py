"""torch computes with Intel's OpenMP where garserve comes first and the environment has it; nothing else changes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from garserve import openmp

needs_intel = pytest.mark.skipif(openmp.library() is None, reason="no libiomp5 here (garserve[cpu] on x86 brings it)")
_SUM = "import torch; torch.ones(512, 512).matmul(torch.ones(512, 512)); print(torch.get_num_threads())"


def _run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python anew; with KMP_VERSION, Intel's runtime tells on stderr when it is first used."""
    kept = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=kept | {"KMP_VERSION": "1"} | variables, capture_output=True, text=True, check=True
    )


@needs_intel
@pytest.mark.parametrize(
    ("before", "intel"),
    [
        ("import garserve; garserve.load", True),
        ("import garserve; garserve.RegionRequest", True),
        ("import garserve; garserve.Region", False),
        ("import torch, garserve; garserve.load", False),
    ],
    ids=["load", "request", "no torch needed", "torch first"],
)
def test_torch_takes_what_was_there_first(before: str, intel: bool) -> None:
    done = _run(f"{before}\n{_SUM}")
    assert ("Intel(R) OMP" in done.stderr) == intel, done.stderr
    assert int(done.stdout) >= 1


@needs_intel
def test_it_can_be_switched_off() -> None:
    assert "Intel(R) OMP" not in _run(f"import garserve; garserve.load\n{_SUM}", GARSERVE_OPENMP="torch").stderr


@needs_intel
def test_processes_that_are_started_get_it_by_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/nowhere/other.so:/nowhere/libgomp.so.1")
    variables = openmp.environment()
    assert variables["LD_PRELOAD"].split(":") == ["/nowhere/other.so", str(openmp.library())]
    monkeypatch.setenv("LD_PRELOAD", variables["LD_PRELOAD"])
    assert openmp.environment() == {}, "asked twice, it is preloaded once"
    assert "Intel(R) OMP" in _run(_SUM, LD_PRELOAD=str(openmp.library())).stderr


@needs_intel
def test_beside_another_runtime_it_stays_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a numpy with MKL from conda may have brought it."""
    maps, own = tmp_path / "maps", openmp.library()
    assert own is not None
    monkeypatch.setattr(openmp, "_MAPS", maps)
    line = "7f2b5f400000-7f2b5f421000 r--p 00000000 fe:00 1235 "
    for name, another in ((own.resolve(), False), ("/usr/lib/libgomp.so.1", False), ("/opt/mkl/lib/libiomp5.so", True)):
        maps.write_text(f"{line}  /usr/lib/libc.so.6\n{line}  {name}\n7ffc2000-7ffc3000 rw-p 00000000 00:00 0\n")
        assert openmp._another(own) == another


def test_without_the_library_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(openmp.sys, "prefix", str(tmp_path))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert openmp.library() is None
    assert openmp.environment() == {}
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").write_bytes(b"for another processor")
    monkeypatch.setattr(openmp, "_is_loaded", lambda: False)
    monkeypatch.delitem(openmp.sys.modules, "torch", raising=False)
    assert not openmp.prefer_intel()
