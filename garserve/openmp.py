"""Which OpenMP runtime torch gets on a CPU: Intel's, where vLLM's CPU build has brought it.

torch's wheel brings GNU's. Where a process has more of its threads than cores (those of the thread that steps the
engine, and those of its callers'), they fall asleep after each operation, and waking them takes longer than a small
operation: a decoding step of the tiny checkpoint takes 7.0 ms, and 3.4 ms with Intel's, whose threads look out for work
for a while (two cores). The symbols of both are the same, and the one that is loaded first and globally is taken: so
this has to come before torch. It is what preloading libiomp5 does, which vLLM recommends, without a new process.
"""

import ctypes
import os
import sys
from pathlib import Path

OFF = "GARSERVE_OPENMP"
_MILLISECONDS = "10"  # that an idle thread looks out; 200 by itself, in which it would keep a core from others

_MAPS = Path("/proc/self/maps")  # the files that this process has in its memory


def library() -> Path | None:
    """Return Intel's OpenMP runtime of this Python environment; None where there is none, or it is not wanted."""
    path = Path(sys.prefix) / "lib" / "libiomp5.so"
    wanted = os.environ.get(OFF, "intel") != "torch"
    return path if wanted and sys.platform == "linux" and path.is_file() else None


def prefer_intel() -> bool:
    """Load Intel's runtime for torch to use, and say whether torch has it: not where torch was imported before."""
    if _is_loaded():
        return True
    path = library()
    if path is None or "torch" in sys.modules or _another(path):
        return False
    os.environ.setdefault("KMP_BLOCKTIME", _MILLISECONDS)
    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError:  # made for another processor
        return False
    return True


def environment() -> dict[str, str]:
    """Return the variables by which Python processes that are started from here get it, too.

    GNU's runtime, which vLLM leaves in LD_PRELOAD where it finds no other there, makes room: vLLM takes one of the two.
    """
    path, before = library(), os.environ.get("LD_PRELOAD", "").split(":")
    if path is None or any("libiomp5" in other for other in before):
        return {}
    others = [other for other in before if other and "libgomp" not in other]
    return {
        "LD_PRELOAD": ":".join([*others, str(path)]),
        "KMP_BLOCKTIME": os.environ.get("KMP_BLOCKTIME", _MILLISECONDS),
    }


def _another(path: Path) -> bool:
    """Say whether a file other than this one has brought an Intel or LLVM runtime: a second one ends the process."""
    names = {line.split(maxsplit=5)[-1].strip() for line in _MAPS.read_text().splitlines() if "omp" in line}
    return any(Path(name).name.startswith(("libiomp5", "libomp")) and Path(name) != path.resolve() for name in names)


def _is_loaded() -> bool:
    """Say whether an Intel runtime is visible to what is loaded next (by this module, or by LD_PRELOAD)."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "kmp_set_blocktime")
