"""The process that has started an engine's process: when it is gone, nobody can ask the engine anything any more."""

import os
import threading
from multiprocessing import connection, current_process, parent_process

_ENGINE = "EngineCore"  # what vLLM calls such a process; its workers end with it by themselves


def end_with_parent() -> None:
    """Let this process end when its parent has, however that ended, if it is one that vLLM started for an engine.

    vLLM's own ends only where it is told to. A server that was killed would leave it behind with its memory, a GPU's
    above all, and the next start would find no room.
    """
    parent = parent_process()
    if parent is not None and current_process().name.startswith(_ENGINE):
        threading.Thread(target=_wait, args=(parent.sentinel,), name="garserve-parent", daemon=True).start()


def _wait(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
