"""From nothing to the first answer, step by step, each run in a fresh process."""

import json
import subprocess
import sys
from statistics import median

from garserve.bench.result import Result, Row
from garserve.errors import GarserveError

_SCRIPT = """
import json, sys, time
start = time.perf_counter()
import garserve
imported = time.perf_counter()
engine = garserve.load(sys.argv[1], sys.argv[2])
loaded = time.perf_counter()
from garserve.bench.workload import picture
size = (256, 256)
engine.describe(picture(0, size), [[20, 20, 120, 120]], max_tokens=8)
first = time.perf_counter()
engine.describe(picture(1, size), [[20, 20, 120, 120]], max_tokens=8)
second = time.perf_counter()
from garserve.bench.runtime import runtime
steps = {"import garserve": imported - start, "load": loaded - imported, "first answer": first - loaded}
steps |= {"second answer": second - first, "import to first answer": first - start}
print("\\n" + json.dumps({"steps": steps, "runtime": str(runtime(engine))}))
engine.close()
"""


def startup(checkpoint: str, backend: str, runs: int) -> Result:
    """Start an engine in `runs` processes, one after the other, and return medians of its steps.

    Raises GarserveError with the end of its log where one does not start.
    """
    found: list[dict[str, float]] = []
    for _ in range(runs):
        command = [sys.executable, "-P", "-c", _SCRIPT, checkpoint, backend]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            raise GarserveError(f"startup: the engine did not start: {done.stderr.strip()[-400:]}")
        last = json.loads(lines[-1])
        found.append(last["steps"])
    rows: list[Row] = [{"step": name, "seconds": median(one[name] for one in found)} for name in found[0]]
    conditions = f"{checkpoint} ({backend}); {last['runtime']}; {runs} fresh processes, medians, 8 tokens an answer"
    return Result("startup", conditions, rows)
