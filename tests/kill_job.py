"""Runs a job in forked children that are killed at random moments: `python -m tests.kill_job IN OUT CHECKPOINT KILLS`.

Forking spares every child the imports, so that many kills cost little. Nothing here has used torch's threads before.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import garserve
from garserve.batch.run import run_job
from garserve.model import reference_backend as reference_backend  # imported once, for all children
from tests.batch_data import plan_of

PATIENCE = 300.0  # seconds for a child to start and to write its next rows


def job(source: Path, output: Path, checkpoint: Path) -> None:
    """Answer what is left, with the reference."""
    plan = plan_of(source, output, checkpoint, max_num_tiles=1, max_tokens=2, in_flight=8)
    run_job(plan, lambda: garserve.load(checkpoint, "reference", max_num_tiles=1))


def forked(source: Path, output: Path, checkpoint: Path) -> int:
    """Run the job in a child and return its process id."""
    if (child := os.fork()) == 0:
        job(source, output, checkpoint)
        os._exit(0)
    return child


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_rows(child: int, output: Path, aim: int) -> None:
    """Wait until so many rows are there. Raises RuntimeError where the child ends before, or where they never come."""
    deadline = time.monotonic() + PATIENCE
    while (found := lines(output)) < aim:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            raise RuntimeError(f"the job ended with {os.waitstatus_to_exitcode(status)}; it has {found} rows of {aim}")
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            raise RuntimeError(f"the job has {found} rows of {aim} after {PATIENCE:g} seconds")
        time.sleep(0.002)


def main(source: Path, output: Path, checkpoint: Path, kills: int, count: int) -> None:
    """Kill so many children at random moments, spread over the job; print how many died, and the rows after each."""
    chance, killed, seen = random.Random(0), 0, []
    for kill in range(kills):
        before = lines(output)
        early = chance.random() < 0.3  # while it starts, perhaps before its first row
        aim = before + (0 if early else chance.randint(1, max((count - before) // (kills - kill + 1), 1)))
        child = forked(source, output, checkpoint)
        wait_for_rows(child, output, aim)
        time.sleep(chance.uniform(0, 0.3 if early else 0.02))
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        seen.append(lines(output))
    print(killed, *seen)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *map(int, sys.argv[4:]))
