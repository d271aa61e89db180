"""Joining a Ray cluster, or starting one on this machine, and how many engines it takes (garserve[ray])."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from garserve.errors import GarserveError, RequestError

ANY, LOCAL = "auto", "local"
_OBJECT_STORE_BYTES = 256 << 20  # of a cluster on this machine: what travels are requests and rows


@dataclass(frozen=True)
class Engines:
    """Which cluster, and what each engine of it takes; None is chosen by what the cluster has.

    `address` is that of a cluster, "local" for one that is started on this machine and ends with the job, or "auto"
    for the one that RAY_ADDRESS names or that runs on this machine, else "local".
    """

    address: str = ANY
    count: int | None = None
    cpus: float | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.address.startswith("ray://"):
            raise RequestError(
                f"--ray {self.address}: expected a cluster that this machine is a node of; "
                "from elsewhere, submit the command to it with `ray job submit`"
            )


@dataclass(frozen=True)
class Placement:
    """How many engines there are, and what Ray sets aside for each."""

    count: int
    cpus: float
    gpus: float


def ray_module() -> Any:
    """Return ray; GarserveError where it is not installed."""
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread that outlives a job must not begin another
        import ray
        import ray.data
    except ImportError as error:
        raise GarserveError(f"--ray needs Ray: pip install 'garserve[ray]' ({error})") from None
    return ray


@contextmanager
def cluster(engines: Engines, *, verbose: bool = False) -> Iterator[Placement]:
    """Be part of a cluster; one that was started for it ends with the context."""
    ray = ray_module()
    if ray.is_initialized():
        raise GarserveError("--ray: this process is part of a Ray cluster already")
    if not verbose:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr):  # where Ray says what died, while this process's own output is for machines
        with _signals_kept():
            _connect(ray, engines, verbose)
        try:
            yield _placed(ray, engines)
        finally:
            with _signals_kept():
                ray.shutdown()


def _connect(ray: Any, engines: Engines, verbose: bool) -> None:
    level = "INFO" if verbose else "ERROR"
    common: dict[str, Any] = {"log_to_driver": verbose, "logging_level": level}
    local = {"num_cpus": os.cpu_count(), "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        if engines.address not in (ANY, LOCAL):
            ray.init(engines.address, **common)
            return
        if engines.address == ANY:
            try:
                ray.init("auto", **common)
                return
            except ConnectionError:  # there is none
                if address := os.environ.get("RAY_ADDRESS"):
                    raise GarserveError(f"--ray: no cluster answers at RAY_ADDRESS {address}") from None
        ray.init("local", **common, **local)
    except GarserveError:
        raise
    except Exception as error:  # Ray raises bare ones, too, as where a busy machine is slow to start it
        raise GarserveError(f"--ray {engines.address}: {error}") from None


def _placed(ray: Any, engines: Engines) -> Placement:
    """Choose what was left open: an engine for each GPU, or without any, one for each node with half of its cores."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [node.get("CPU", 0.0) for node in nodes]
    gpus = engines.gpus
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU") for node in nodes) else 0.0
    slots = sum(node.get("GPU", 0.0) // gpus for node in nodes) if gpus else len(nodes)
    count = int(slots) if engines.count is None else engines.count
    share = 1.0 if gpus else max(max(cpus) // 2, 1.0)
    wanted = share if engines.cpus is None else engines.cpus
    room = sum(min(_fit(node.get("CPU", 0.0), wanted), _fit(node.get("GPU", 0.0), gpus)) for node in nodes)
    if count < 1 or room < count:
        raise RequestError(
            f"--engines {count} with {wanted:g} CPUs and {gpus:g} GPUs each: the cluster has room for {room:.0f} "
            f"(its nodes have {', '.join(f'{one:g}' for one in cpus)} CPUs)"
        )
    return Placement(count, wanted, gpus)


def _fit(have: float, each: float) -> float:
    return have // each if each else float("inf")


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Undo that Ray takes SIGTERM for itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
