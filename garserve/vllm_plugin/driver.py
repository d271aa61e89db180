"""Drives vLLM's engine from one thread of its own, for callers of any kind: blocking, streaming, asynchronous.

The thread that steps the engine is the one that made it (OpenMP threads are bound to it on a CPU).
"""

import atexit
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from traceback import format_exception
from typing import TYPE_CHECKING, Any

import torch

from garserve.errors import GarserveError, RequestError
from garserve.generation import OnReport, Progress, Sampling, deliver
from garserve.inputs.processor import PreparedRequest
from garserve.tracing import span
from garserve.vllm_plugin.arguments import engine_environment, ranks, sampling_params, worker_arguments

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


_WATCH_SECONDS = 0.5


@dataclass
class _Running:
    on_report: OnReport
    engine_id: str | None = None
    again: Callable[[], object] | None = None  # hands it over once more, where not all of its items were sent


class EngineDriver:
    """Owns an LLMEngine and the thread that steps it. `submit` may be called from any thread."""

    def __init__(
        self,
        arguments: dict[str, Any],
        *,
        separate_process: bool = False,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the engine; an error of its start is raised here.

        `on_end` is called by the engine's thread when no engine is left, which may be long after Ctrl-C has broken this
        off: vLLM's start cannot be, so the thread closes the engine as soon as it has started.
        """
        self._separate_process = separate_process
        self._on_end = on_end
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running: dict[str, _Running] = {}
        self._numbers = itertools.count()
        self._started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._dead: BaseException | None = None
        self._lock = threading.Lock()
        self.engine: LLMEngine
        self._thread = threading.Thread(target=self._run, args=(arguments,), name="garserve-engine", daemon=True)
        threads = torch.get_num_threads()
        try:
            self._thread.start()
            error = self._started.get()
        except BaseException:
            self._stop()
            raise
        if error is not None:
            raise error
        _keep_threads(threads)
        atexit.register(self.close)

    def submit(self, prepared: PreparedRequest, sampling: Sampling, on_report: OnReport) -> Callable[[], None]:
        """Queue a request; `on_report` is called from the engine's thread. Returns a function that cancels it."""
        number = str(next(self._numbers))

        def add() -> None:
            running = _Running(on_report)
            if not self._hand_over(number, running, prepared, sampling):
                running.again = partial(self._hand_over, number, running, prepared, sampling)

        def cancel() -> None:
            running = self._running.pop(number, None)
            if running is not None and running.engine_id is not None:
                self.engine.abort_request([running.engine_id], internal=True)

        self._send(add)
        return lambda: self._send(cancel, even_if_dead=True)

    def _hand_over(self, number: str, running: _Running, prepared: PreparedRequest, sampling: Sampling) -> bool:
        """Give a request to vLLM, or report why it cannot be; return whether all of its items went with it."""
        self._running[number] = running
        try:
            with span("hand over"):
                running.engine_id, sent = self._add(number, prepared, sampling)
        except Exception as error:  # vLLM refuses requests with several kinds of error
            del self._running[number]
            if _is_dead(self.engine):
                deliver(running.on_report, GarserveError(f"the engine has stopped: {error}"))
                return True
            with suppress(Exception):  # it may be known to vLLM in part already
                self.engine.abort_request([number])
            deliver(running.on_report, RequestError(f"refused by vLLM: {error}"))
            return True
        return sent

    def _add(self, number: str, prepared: PreparedRequest, sampling: Sampling) -> tuple[str, bool]:
        from garserve.vllm_plugin.items import engine_input, share_with_engine

        prompt = engine_input(prepared)
        cache = self.engine.renderer.mm_processor_cache
        new = [item.hash for item in prepared.items] if cache is None else share_with_engine(cache, prompt)
        try:
            engine_id = self.engine.add_request(number, prompt, sampling_params(sampling))
        except Exception:
            for item_hash in new if cache is not None else ():  # the engine never saw these; the others it has
                cache.invalidate(item_hash)
            raise
        return engine_id, len(new) == len(prepared.items)

    def call(self, function: Callable[["LLMEngine"], Any]) -> Any:
        """Run a function on the engine in its thread, between two steps, and return what it returns."""
        answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answer.put((function(self.engine), None))
            except Exception as error:  # handed to the caller
                answer.put((None, error))

        self._send(run)
        value, error = answer.get()
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """Stop the thread and the engine; requests that still run are told so."""
        self._stop()
        self._thread.join()
        atexit.unregister(self.close)

    def _stop(self) -> None:
        with self._lock:
            if self._dead is None:
                self._dead = GarserveError("the engine is closed")
                self._inbox.put(None)

    def _send(self, command: Callable[[], None], *, even_if_dead: bool = False) -> None:
        with self._lock:
            if self._dead is not None:
                if even_if_dead:
                    return
                raise GarserveError(f"the engine has stopped: {self._dead}") from self._dead
            self._inbox.put(command)

    def _run(self, arguments: dict[str, Any]) -> None:
        try:
            self.engine = _make_engine(arguments, self._separate_process)
        except BaseException as error:  # also SystemExit, which some of vLLM's checks raise
            self._on_end()
            self._started.put(error)
            return
        self._started.put(None)
        try:
            self._work()
        finally:
            self._on_end()

    def _work(self) -> None:
        if self._separate_process:
            threading.Thread(target=self._watch, args=(self.engine,), name="garserve-watch", daemon=True).start()
        try:
            while self._take_commands():
                if self.engine.has_unfinished_requests():
                    self._step()
        except Exception as error:
            with self._lock:
                # Told and kept without its frames, which hold the model: the next engine needs the memory.
                logging.getLogger("garserve").error("the engine has failed\n%s", "".join(format_exception(error)))
                self._dead = self._dead or GarserveError(f"{type(error).__name__}: {error}")
        self._end()

    def _watch(self, engine: "LLMEngine") -> None:
        """End the thread when the engine's process has died, for which vLLM's blocking client would wait forever."""
        while self._dead is None and not _is_dead(engine):
            time.sleep(_WATCH_SECONDS)
        with self._lock:
            if self._dead is not None:
                return
            self._dead = GarserveError("its process died")
            self._inbox.put(None)
        core: Any = engine.engine_core
        core.outputs_queue.put_nowait(self._dead)
        for waiting in list(core.utility_results.values()):  # `call` may wait for one of these instead
            with suppress(InvalidStateError):  # it has been answered
                waiting.set_exception(self._dead)

    def _take_commands(self) -> bool:
        """Run what callers have sent, waiting for it while there is nothing to compute. False ends the thread."""
        while True:
            try:
                command = self._inbox.get(block=not self.engine.has_unfinished_requests())
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            if self._inbox.empty():
                return True

    def _step(self) -> None:
        with span("engine step"):
            outputs = self.engine.step()
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None:
                continue
            completion = output.outputs[0]
            if output.finished:
                del self._running[output.request_id]
                if (reason := completion.finish_reason) not in ("stop", "length"):
                    if reason == "error" and running.again is not None:
                        self._repeat(running)
                        continue
                    failed = GarserveError("the engine was told to stop") if reason == "abort" else None
                    failed = failed or RequestError(f"vLLM gave this request up (finish reason: {reason})")
                    deliver(running.on_report, failed)
                    continue
            progress = Progress(
                list(completion.token_ids),
                completion.finish_reason if output.finished else None,
                output.num_cached_tokens or 0,
                _first_logits(completion.logprobs),
            )
            running.again = None
            if not deliver(running.on_report, progress) and not output.finished:
                # Nobody listens any more (an event loop that was closed, say): the others must not suffer for it.
                del self._running[output.request_id]
                if running.engine_id is not None:
                    self.engine.abort_request([running.engine_id], internal=True)

    def _repeat(self, running: _Running) -> None:
        """Hand a request over a second and last time, after the engine had let go of an item that was not sent to it.

        vLLM tells no more than "error", and has noted what is missing, so that it is sent now.
        """
        again, running.again = running.again, None
        if again is not None:
            again()

    def _end(self) -> None:
        error = GarserveError(f"the engine has stopped: {self._dead}")
        while not self._inbox.empty():
            if (command := self._inbox.get()) is not None:
                with suppress(Exception):  # whoever waits is told below
                    command()
        for running in self._running.values():
            deliver(running.on_report, error)
        self._running.clear()
        self.engine.engine_core.shutdown()
        del self.engine


def _make_engine(arguments: dict[str, Any], separate_process: bool) -> "LLMEngine":
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    if separate_process:
        arguments = arguments | worker_arguments(arguments)
    # Off the CPU, as many sequences at a time as for vLLM's own LLM class; an engine by itself would have 128.
    context = UsageContext.ENGINE_CONTEXT if current_platform.is_cpu() else UsageContext.LLM_CLASS
    with engine_environment(ranks(arguments), separate_process=separate_process):
        return LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=context)


def _keep_threads(threads: int) -> None:
    """Give the process back torch's threads, of which a GPU's worker takes all but one: images are resized here, too.

    Not to be called from the engine's thread, whose compiled code was made for one.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        torch.set_num_threads(threads)


def _is_dead(engine: "LLMEngine") -> bool:
    """Say whether vLLM has seen its engine process die; in this process there is none."""
    return bool(getattr(getattr(engine.engine_core, "resources", None), "engine_dead", False))


def _first_logits(logprobs: Any) -> list[float] | None:
    """Return the first step's values in the order of the token ids; raw logits with `logprobs_mode="raw_logits"`."""
    if not logprobs:
        return None
    first = logprobs[0]
    return [first[token].logprob for token in range(len(first))]
