"""A job that is killed at random moments, again and again, ends with the rows of one that never was.

`GARSERVE_KILLS=20` kills so often (default 6).
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.batch_data import rows, write_requests
from tests.conftest import ROOT
from tests.kill_job import lines

COUNT = 300
KILLS = int(os.environ.get("GARSERVE_KILLS", "6"))
VLLM_KILLS = int(os.environ.get("GARSERVE_KILLS_VLLM", "0"))
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


@pytest.mark.vllm
@pytest.mark.skipif(VLLM_KILLS == 0, reason="takes a minute for each kill; GARSERVE_KILLS_VLLM=5 kills so often")
def test_sigkill_of_the_command_with_vllm(tmp_path: Path) -> None:
    """The whole road: `garserve batch`, tiny in vLLM, two workers, killed while it starts or runs."""
    pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
    source = write_requests(tmp_path, COUNT)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"

    def command(output: Path) -> list[str]:
        told = ["-i", source, "-o", output, "--max-tokens", 12, "--workers", 2, "--in-flight", 16]
        return [sys.executable, "-c", "from garserve.cli import main; main()", "batch", *map(str, told)]

    chance, seen = random.Random(0), []
    for kill in range(VLLM_KILLS):
        before = lines(out)
        early = kill % 3 == 2  # while it starts, or on its first rows
        aim = before + (0 if early else chance.randint(1, max((COUNT - before) // (VLLM_KILLS - kill + 1), 1)))
        with subprocess.Popen(command(out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while lines(out) < aim and process.poll() is None:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 10 if early else 0.2))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        seen.append(lines(out))
    assert seen == sorted(seen)
    assert 0 < seen[-1] < COUNT
    for output in (out, whole):
        subprocess.run(command(output), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    found = rows(out)
    assert sorted(row["id"] for row in found) == sorted(f"r{i}" for i in range(COUNT))
    assert {row["id"]: row["text"] for row in found} == {row["id"]: row["text"] for row in rows(whole)}
    print(f"rows after each kill: {seen}")


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
