"""The reference as a backend: requests that wait are decoded together, in a thread of its own."""

import queue
import threading
from collections.abc import Callable

import torch

from garserve.checkpoint import Checkpoint
from garserve.errors import GarserveError, RequestError
from garserve.generation import OnReport, Progress, Sampling, deliver
from garserve.inputs.processor import PreparedRequest
from garserve.model.encoder import TileFeatures
from garserve.model.reference import ReferenceGAR
from garserve.model.tile_cache import TileCounts
from garserve.tracing import span

_Job = tuple[PreparedRequest, Sampling, OnReport, threading.Event]


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
        try:
            torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
        except (KeyError, TypeError):
            raise RequestError(f"dtype: expected float32, bfloat16 or float16, got {dtype!r}") from None
        if type(batch_size) is not int or batch_size < 1:
            raise RequestError(f"batch_size: expected at least 1, got {batch_size!r:.80}")
        self.model = ReferenceGAR.load(checkpoint, torch_dtype, vision=vision, tile_cache_gb=tile_cache_gb)
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
                raise GarserveError("the engine is closed")
            self._inbox.put((prepared, sampling, on_report, cancelled))
        return cancelled.set

    def tile_counts(self) -> TileCounts:
        """Return what became of the tiles so far."""
        return self.model.encoder.tile_cache.counts

    def token_room(self) -> int | None:
        """Return None: what runs is bounded by `batch_size`."""
        return None

    def close(self) -> None:
        """End the thread after the requests that wait."""
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
            self._decode([one for one in jobs if not one[3].is_set()])

    def _decode(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        stop = jobs[0][1].stop_id

        def on_token(index: int, token: int) -> bool:
            _, sampling, on_report, cancelled = jobs[index]
            taken = not sampling.stream or deliver(on_report, Progress([token]))
            return taken and not cancelled.is_set()

        try:
            limits = [job[1].max_tokens for job in jobs]
            with span("engine step"):
                tokens, logits = self.model.generate([job[0] for job in jobs], limits, stop, on_token)
        except Exception as error:  # reported to whoever waits, the thread lives on
            for job in jobs:
                deliver(job[2], error)
            return
        for (_, sampling, on_report, _), ids, first in zip(jobs, tokens, logits, strict=True):
            reason = "stop" if ids[-1] == stop else "length"
            logits_row = first.tolist() if sampling.first_logits else None
            deliver(on_report, Progress([] if sampling.stream else ids, reason, 0, logits_row))
