"""A job that is killed at random moments, again and again, ends with the rows of one that never was.

`GARSERVE_KILLS=20` kills so often (default 6).
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.batch_data import rows, write_requests
from tests.conftest import ROOT

COUNT = 300
KILLS = int(os.environ.get("GARSERVE_KILLS", "6"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # a busy machine is slow to bring threads together


def job(source: Path, output: Path, checkpoint: Path, kills: int) -> list[int]:
    """Kill a job so often; return how many kills hit it, and the rows that were there after each."""
    paths = [str(source), str(output), str(checkpoint)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_job", *paths, str(kills), str(COUNT)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    return list(map(int, done.stdout.split()))


def test_sigkill_at_random_moments(mini: Path, tmp_path: Path) -> None:
    source = write_requests(tmp_path, COUNT)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    killed, *seen = job(source, out, mini, KILLS)
    assert killed == KILLS
    assert seen == sorted(seen)
    assert 0 < seen[-1] < COUNT
    with out.open("ab") as file:
        file.write(b'{"id": "r1", "tex')  # as a crash of the machine may leave it
    script = "import sys; from pathlib import Path; from tests.kill_job import job; job(*map(Path, sys.argv[1:]))"
    for output in (out, whole):
        command = [sys.executable, "-c", script, str(source), str(output), str(mini)]
        subprocess.run(command, check=True, cwd=ROOT, env=ENVIRONMENT)
    found = rows(out)
    assert sorted(row["id"] for row in found) == sorted(f"r{i}" for i in range(COUNT))
    assert {row["id"]: row["text"] for row in found} == {row["id"]: row["text"] for row in rows(whole)}


def test_ctrl_c_once_finishes_what_runs(mini: Path, tmp_path: Path) -> None:
    source, out = write_requests(tmp_path, 200), tmp_path / "out.jsonl"
    told = ["-i", source, "-o", out, "-c", mini, "--backend", "reference", "--max-tokens", 2, "--workers", 0]
    command = [sys.executable, "-c", "from garserve.cli import main; main()", "batch", *map(str, told)]
    with subprocess.Popen(
        [*command, "--in-flight", "8", "--metrics-file", str(tmp_path / "m.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
    ) as process:
        while not (out.exists() and out.read_bytes().count(b"\n") >= 5) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert "once more stops at once" in errors
    assert 5 <= len(rows(out)) < 200
    assert '"stopped": "interrupted"' in (tmp_path / "m.json").read_text()
