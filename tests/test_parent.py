"""A process that vLLM started for an engine ends with whoever started it, however that ended."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from garserve.vllm_plugin.parent import follow_parent

SPAWN = multiprocessing.get_context("spawn")


def child(own: Connection) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background begins with it ignored
    follow_parent()
    own.send((os.getpid(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN))
    time.sleep(60)


def parent(own: Connection, name: str) -> None:
    SPAWN.Process(target=child, args=(own,), name=name).start()
    time.sleep(60)


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # dead, and not yet taken note of by whoever has it now


@pytest.mark.parametrize(("name", "ends"), [("EngineCore", True), ("EngineCore_DP1", True), ("another", False)])
def test_an_engine_does_not_outlive_its_parent(name: str, ends: bool) -> None:
    here, there = SPAWN.Pipe()
    starter = SPAWN.Process(target=parent, args=(there, name))
    starter.start()
    assert here.poll(60)
    engine, ignores_ctrl_c = here.recv()
    assert ignores_ctrl_c == ends
    time.sleep(0.5)
    assert lives(engine)
    starter.kill()
    starter.join()
    deadline = time.monotonic() + (20 if ends else 1)
    while lives(engine) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lives(engine) != ends
    if not ends:
        os.kill(engine, signal.SIGKILL)
