"""How many requests may be in work, and whether new ones are taken at all."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from garserve.serving import metrics
from garserve.serving.errors import RETRY_SECONDS, APIError


class Admission:
    """Counts requests in work; belongs to one event loop."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_work = 0
        self.closed: str | None = None  # why no more are taken
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        """Count a request in. Raises a 503 when the server is going down, a 429 when enough are in work."""
        if self.closed is not None:
            metrics.rejected.labels("closed").inc()
            headers = {"Retry-After": str(RETRY_SECONDS)}
            raise APIError(503, f"not taken: {self.closed}", code="unavailable", headers=headers)
        if self.in_work >= self.limit:
            metrics.rejected.labels("queue").inc()
            raise APIError(
                429,
                f"{self.in_work} requests are in work or waiting, the most that are taken; try again",
                code="queue_full",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        self.in_work += 1
        metrics.requests.inc()
        self._idle.clear()

    def leave(self) -> None:
        """Count a request out."""
        self.in_work -= 1
        metrics.requests.dec()
        if self.in_work == 0:
            self._idle.set()

    def close(self, reason: str) -> None:
        """Take no more requests; the first reason stays."""
        self.closed = self.closed or reason

    async def idle(self, seconds: float) -> bool:
        """Wait until nothing is in work, at most so long, and return whether it came to that."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True


class PixelBudget:
    """Room for so many pixels of decoded images; belongs to one event loop. A file of 6 kB may hold 50 million."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._turn = asyncio.Lock()  # who has waited longest has it
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def room(self, pixels: int) -> AsyncIterator[None]:
        """Hold room for so many pixels, when it is there; an image larger than all of it has it alone."""
        async with self._turn:
            while self.held and self.held + pixels > self.limit:
                self._freed.clear()
                await self._freed.wait()
            self.held += pixels
        try:
            yield
        finally:
            self.held -= pixels
            self._freed.set()
