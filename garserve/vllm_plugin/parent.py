"""An engine's process and the process that started it: the one ends with the other, and leaves Ctrl-C to it."""

import os
import signal
import threading
from multiprocessing import connection, current_process, parent_process

_ENGINE = "EngineCore"  # what vLLM calls such a process; its workers end with it by themselves


def follow_parent() -> None:
    """Let this process end when its parent has, if it is one that vLLM started for an engine, and not at Ctrl-C.

    vLLM's own ends only where it is told to. A server that was killed would leave it behind with its memory, a GPU's
    above all, and the next start would find no room. Ctrl-C in a terminal reaches all processes there, and vLLM's would
    give up what runs; its parent lets that finish, and then ends it by SIGTERM.
    """
    parent = parent_process()
    if parent is None or not current_process().name.startswith(_ENGINE):
        return
    threading.Thread(target=_wait, args=(parent.sentinel,), name="garserve-parent", daemon=True).start()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _wait(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
