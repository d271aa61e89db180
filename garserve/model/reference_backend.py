"""The reference as a backend: requests that wait are decoded together, in a thread of its own."""

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from garserve.checkpoint import Checkpoint
from garserve.errors import GarserveError, InputError, RequestError, first_line
from garserve.generation import OnReport, Progress, Sampling, deliver
from garserve.inputs.processor import PreparedRequest
from garserve.model.encoder import TileFeatures
from garserve.model.reference import ReferenceGAR
from garserve.model.tile_cache import TileCache, TileCounts
from garserve.tracing import span

_Job = tuple[PreparedRequest, Sampling, OnReport, threading.Event]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OPTIONS = ("dtype", "batch_size", "tile_cache_gb")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise RequestError for an option that the reference does not have, or a value that it does not take."""
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise RequestError(f"engine option {unknown[0]!r} is none of the reference's ({', '.join(_OPTIONS)})")
    dtype, batch_size = options.get("dtype", "float32"), options.get("batch_size", 1)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise RequestError(f"dtype: expected float32, bfloat16 or float16, got {dtype!r:.80}")
    if type(batch_size) is not int or batch_size < 1:
        raise RequestError(f"batch_size: expected at least 1, got {batch_size!r:.80}")
    TileCache(options.get("tile_cache_gb", 0.0))


class ReferenceBackend:
    """Greedy decoding by ReferenceGAR on the CPU; slow and simple."""

    name = "reference"

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str = "float32",
        batch_size: int = 4,
        tile_cache_gb: float = 0.0,
        vision: TileFeatures | None = None,
    ) -> None:
        """Load the weights in `dtype` and start the thread; at most `batch_size` requests are decoded together.

        `tile_cache_gb` (10⁹ bytes) is kept for features of tiles; 0 computes them anew for every request.
        `vision` computes tiles in the place of the tower, whose weights are not loaded then.
        """
        check_options({"dtype": dtype, "batch_size": batch_size, "tile_cache_gb": tile_cache_gb})
        self.model = ReferenceGAR.load(checkpoint, _DTYPES[dtype], vision=vision, tile_cache_gb=tile_cache_gb)
        self._batch_size = batch_size
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()  # nothing is queued behind the end
        self._thread = threading.Thread(target=self._run, name="garserve-reference", daemon=True)
        self._thread.start()

    def submit(self, prepared: PreparedRequest, sampling: Sampling, on_report: OnReport) -> Callable[[], None]:
        """Queue a request; reports come from the backend's thread. Returns a function that cancels it."""
        if sampling.temperature > 0:
            raise RequestError(f"temperature: the reference decodes greedily (0), got {sampling.temperature}")
        cancelled = threading.Event()
        with self._lock:
            if self._closed:
                raise _closed()
            self._inbox.put((prepared, sampling, on_report, cancelled))
        return cancelled.set

    def tile_counts(self) -> TileCounts:
        """Return what became of the tiles so far."""
        return self.model.encoder.tile_cache.counts

    def token_room(self) -> int | None:
        """Return None: what runs is bounded by `batch_size`."""
        return None

    def close(self) -> None:
        """End the thread; requests that wait or are being decoded end with an error."""
        with self._lock:
            self._closed = True
            self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._inbox.get()) is not None:
            jobs = [job]
            while len(jobs) < self._batch_size and not self._inbox.empty():
                following = self._inbox.get()
                if following is None:
                    self._inbox.put(None)
                    break
                jobs.append(following)
            self._decode(jobs)

    def _decode(self, jobs: list[_Job], delivered: int = 0) -> None:
        """Decode jobs together and report to each; its first `delivered` tokens, if it streams, it has already.

        What fails for several together is decoded one by one: only a request that fails by itself is to blame.
        """
        jobs = [job for job in jobs if not job[3].is_set()]
        if not jobs:
            return
        if self._closed:
            for job in jobs:
                deliver(job[2], _closed())
            return
        stop, counts = jobs[0][1].stop_id, [0] * len(jobs)

        def on_token(index: int, token: int) -> bool:
            _, sampling, on_report, cancelled = jobs[index]
            counts[index] += 1
            taken = not sampling.stream or counts[index] <= delivered or deliver(on_report, Progress([token]))
            return taken and not cancelled.is_set() and not self._closed

        failed = False
        try:
            limits = [job[1].max_tokens for job in jobs]
            with span("engine step"):
                tokens, logits = self.model.generate([job[0] for job in jobs], limits, stop, on_token)
        except Exception as error:  # of the tower's or the decoder's; the thread lives on
            if len(jobs) == 1:
                deliver(jobs[0][2], _refusal(error))
                return
            failed = True
        if failed:  # out of the handler, whose error holds the memory of what failed
            for job, count in zip(jobs, counts, strict=True):
                self._decode([job], count)
            return
        for job, ids, first in zip(jobs, tokens, logits, strict=True):
            deliver(job[2], self._last_report(job[1], ids, first))

    def _last_report(self, sampling: Sampling, ids: list[int], first: torch.Tensor) -> Progress | GarserveError:
        """Return how a request has ended; `first` [V] are the logits of its first step."""
        reason = "stop" if ids[-1] == sampling.stop_id else "length"
        if self._closed and reason == "length" and len(ids) < sampling.max_tokens:
            return _closed()
        logits = first.tolist() if sampling.first_logits else None
        return Progress([] if sampling.stream else ids, reason, 0, logits)


def _closed() -> GarserveError:
    return GarserveError("the engine is closed")


def _refusal(error: Exception) -> InputError:
    """Return an error that blames one request; any other kind would say that the engine has stopped."""
    if isinstance(error, InputError):
        return error
    refusal = RequestError(f"request cannot be decoded ({type(error).__name__}: {first_line(error)})")
    refusal.__cause__ = error
    return refusal
