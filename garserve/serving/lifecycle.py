"""From warm-up to the last answer: readiness, a watch over the engine, and an end that lets answers finish."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import numpy as np
from starlette.datastructures import State

from garserve.generation import Sampling
from garserve.serving import metrics
from garserve.serving.logs import event, logger
from garserve.serving.preparation import Picture
from garserve.serving.regions import parse_regions
from garserve.serving.service import Service
from garserve.vllm_plugin.arguments import sampling_params
from garserve.vllm_plugin.items import engine_input

_WATCH_SECONDS = 0.25
_COUNT_SECONDS = 5.0
_LAST_WORDS_SECONDS = 2.0  # for requests to hear that the engine has stopped, or that they are cut off
_ABORT_SECONDS = 0.1
_ENGINE_SECONDS = 5  # for an engine that has nothing to do any more to end by itself

WARMING = "warming up"
engine_lost = False  # read by the launcher after the server has ended: then it was no orderly end


class Lifecycle:
    """What a server does besides answering; runs beside the app, in its event loop."""

    def __init__(self, own: Service, state: State) -> None:
        self._own, self._state = own, state
        self.not_ready: str | None = WARMING
        self._ending: asyncio.Task[None] | None = None
        self._cutting = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Warm up, watch and count while the app runs."""
        loop = asyncio.get_running_loop()
        with suppress(NotImplementedError, ValueError):  # vLLM's own handler would end what runs
            loop.add_signal_handler(signal.SIGTERM, self.end)
            loop.add_signal_handler(signal.SIGINT, self.end)
        tasks = [asyncio.ensure_future(task) for task in (self._warm_up(), self._watch(), self._count())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._own.preparer.close()
            event("stopped")

    def state_of_health(self) -> tuple[bool, str | None]:
        """Return whether the engine lives, and why no requests should come, if they should not."""
        alive = not self._own.engine.errored
        return alive, None if alive and self._own.admission.closed is None and self.not_ready is None else (
            self._own.admission.closed or self.not_ready or "the engine has stopped"
        )

    def end(self) -> None:
        """Take no more requests, let those in work finish, and stop the server.

        A second call cuts off those in work, a third waits for nothing.
        """
        if self._ending is None:
            self._own.admission.close("the server is going down")
            self._ending = asyncio.ensure_future(self._drain(self._own.settings.drain_seconds))
        elif not self._cutting:
            self._ending.cancel()
            self._ending = asyncio.ensure_future(self._cut_off())
        else:
            self._stop(force=True)

    async def _drain(self, seconds: float) -> None:
        event("draining", in_work=self._own.admission.in_work, seconds=seconds)
        finished = await self._own.admission.idle(seconds)
        event("drained", finished=finished, in_work=self._own.admission.in_work)
        if finished:
            self._stop(force=False)
        else:
            await self._cut_off()

    async def _cut_off(self) -> None:
        """End the requests in work, whose clients are told, and stop the server.

        vLLM waits for its engine then, as long as for answers, and hears no signal: so the engine is left with nothing
        to do, and with less time.
        """
        self._cutting = True
        event("cutting off", in_work=self._own.admission.in_work)
        config = self._own.engine.vllm_config
        config.shutdown_timeout = min(config.shutdown_timeout, _ENGINE_SECONDS)
        for _ in range(int(_LAST_WORDS_SECONDS / _ABORT_SECONDS)):
            await self._abort()
            if await self._own.admission.idle(_ABORT_SECONDS):  # else some were being prepared, and come now
                break
        self._stop(force=True)

    async def _abort(self) -> None:
        """End all that this process has in the engine; whoever waits for it gets its end with the reason `abort`."""
        engine = self._own.engine
        try:
            await engine.abort(list(engine.output_processor.request_states), internal=True)
        except Exception:
            logging.getLogger(__name__).debug("nothing was aborted", exc_info=True)

    def _stop(self, *, force: bool) -> None:
        self._state.server.should_exit = True
        self._state.server.force_exit = force

    async def _warm_up(self) -> None:
        """Send one request through everything that requests go through, so that the first client's is like any."""
        try:
            own = self._own
            picture = Picture(np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8))
            regions = parse_regions([{"box": [64, 64, 192, 192]}], 4)
            prepared = await own.preparer.run(own.preparer.prepare, picture, regions)
            sampling = sampling_params(Sampling(own.stop_id, max_tokens=2))
            async for _ in own.engine.generate(engine_input(prepared), sampling, "warm-up"):
                pass
        except Exception as error:
            self.not_ready = "the warm-up failed; the log says how"
            logger.error("warm-up failed", exc_info=error)
            return
        self.not_ready = None
        event("ready", models=own.model_names)

    async def _watch(self) -> None:
        """End the server soon after its engine has died, when whoever waited has been told."""
        global engine_lost
        while not self._own.engine.errored:
            await asyncio.sleep(_WATCH_SECONDS)
        if self._ending is not None:
            return
        engine_lost = True
        self._own.admission.close("the engine has stopped")
        logger.error("engine lost", extra={"fields": {"in_work": self._own.admission.in_work}})
        finished = await self._own.admission.idle(_LAST_WORDS_SECONDS)
        self._stop(force=not finished)

    async def _count(self) -> None:
        """Fetch the engine's counts of tiles from time to time."""
        while True:
            try:
                counts: dict[str, Any] = (await self._own.engine.collective_rpc("tile_counts"))[0]
            except Exception:
                logging.getLogger(__name__).debug("no counts of tiles", exc_info=True)
            else:
                metrics.tiles_requested.set(counts["asked"])
                metrics.tiles_computed.set(counts["computed"])
                metrics.tiles_reused.set(counts["asked"] - counts["computed"])
            await asyncio.sleep(_COUNT_SECONDS)
