"""Saved microbenchmarks say what other results say of the machine, and keep statistics instead of every round."""

from typing import Any

import pytest

from garserve.bench.machine import machine, versions


@pytest.hookimpl(optionalhook=True)  # pytest-benchmark's
def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Shorten what `--benchmark-json` writes."""
    output_json["machine_info"], output_json["versions"] = machine(), versions()
    output_json.pop("commit_info", None)  # of the checkout, which is nobody else's
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
