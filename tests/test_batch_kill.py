"""A job that is killed at random moments, again and again, ends with the rows of one that never was.

`GARSERVE_KILLS=20` kills so often (default 2). Each time the whole command dies, workers and all, by SIGKILL.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.batch_data import rows, write_requests
from tests.conftest import ROOT

COUNT = 300
KILLS = int(os.environ.get("GARSERVE_KILLS", "2"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # a busy machine is slow to bring threads together


def command(source: Path, output: Path, checkpoint: Path, *options: str) -> list[str]:
    told = ["-i", str(source), "-o", str(output), "-c", str(checkpoint), "--backend", "reference", *options]
    program = "from garserve.cli import main; main()"
    return [sys.executable, "-c", program, "batch", *told, "--max-tokens", "4", "--workers", "0", "--in-flight", "8"]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_sigkill_at_random_moments(mini: Path, tmp_path: Path) -> None:
    source = write_requests(tmp_path, COUNT)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    subprocess.run(command(source, whole, mini), check=True, capture_output=True, cwd=ROOT, env=ENVIRONMENT)
    chance = random.Random(0)
    killed = 0
    for kill in range(KILLS):
        before = lines(out)
        # Somewhere between this start's first row and its share of the rest.
        aim = before + chance.randint(1, max((COUNT - before) // (KILLS - kill + 1), 1))
        with subprocess.Popen(
            command(source, out, mini),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=ENVIRONMENT,
            process_group=0,
        ) as process:
            while lines(out) < aim and process.poll() is None:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.05))
            os.killpg(process.pid, signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        with out.open("ab") as file:
            file.write(b'{"id": "r1", "tex' if chance.random() < 0.5 else b"")  # as a crash of the machine may leave it
    assert killed == KILLS
    assert lines(out) < COUNT
    subprocess.run(command(source, out, mini), check=True, capture_output=True, cwd=ROOT, env=ENVIRONMENT)
    found = rows(out)
    assert sorted(row["id"] for row in found) == sorted(f"r{i}" for i in range(COUNT))
    assert {row["id"]: row["text"] for row in found} == {row["id"]: row["text"] for row in rows(whole)}


def test_ctrl_c_once_finishes_what_runs(mini: Path, tmp_path: Path) -> None:
    source, out = write_requests(tmp_path, 200), tmp_path / "out.jsonl"
    with subprocess.Popen(
        command(source, out, mini, "--metrics-file", str(tmp_path / "m.json")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
    ) as process:
        while lines(out) < 5 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert "once more stops at once" in errors
    assert 5 <= len(rows(out)) < 200
    assert '"stopped": "interrupted"' in (tmp_path / "m.json").read_text()
