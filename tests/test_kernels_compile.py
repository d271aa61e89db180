"""Kernels compile for GPUs that are not here, without spills and with wide loads and stores."""

import json
import os
import subprocess
import sys

import pytest

# In a process without Triton's interpreter, which would stand in for the compiler.
PROBE = """
import json
from dataclasses import asdict
from garserve.kernels.compile_check import compile_all, compile_replay
from garserve.kernels.roi_replay import Tuning
rows = [asdict(one) | {"good": one.good} for one in compile_all()]
starved = compile_replay("sm_90", "fp32", Tuning(32, 256, 4))
print(json.dumps({"rows": rows, "starved": asdict(starved) | {"good": starved.good}}))
"""


@pytest.fixture(scope="module")
def compiled() -> dict:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_target_and_dtype(compiled: dict) -> None:
    kinds = {(row["kernel"], row["target"], row["dtype"]) for row in compiled["rows"]}
    targets, dtypes = ("sm_80", "sm_90", "sm_100", "gfx942"), ("bf16", "fp16", "fp32")
    assert kinds == {(k, t, d) for k in ("roi_replay", "patch_embed") for t in targets for d in dtypes}


def test_nothing_spills_and_accesses_are_wide(compiled: dict) -> None:
    for row in compiled["rows"]:
        assert row["good"], row
        assert row["spills"] == 0, row
        if row["kernel"] == "roi_replay":
            assert row["narrow_stores"] == 0, row
            # Four samples of four cells for each row; a thread holds eight values, two 16-byte words in float32.
            assert row["wide_loads"] % 16 == 0, row
        assert 0 < row["registers"] < 240, row
        assert row["occupancy"] >= 0.12, row


def test_a_program_that_is_too_large_is_seen_to_spill(compiled: dict) -> None:
    assert compiled["starved"]["spills"] > 0
    assert not compiled["starved"]["good"]
