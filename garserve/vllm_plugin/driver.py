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
from traceback import format_exception
from typing import TYPE_CHECKING, Any

import torch

from garserve.errors import GarserveError
from garserve.generation import OnReport, Sampling
from garserve.inputs.processor import PreparedRequest
from garserve.tracing import span
from garserve.vllm_plugin.arguments import engine_environment, ranks, worker_arguments
from garserve.vllm_plugin.requests import Requests, is_dead

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


_WATCH_SECONDS = 0.5


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
        self._numbers = itertools.count()
        self._started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._dead: BaseException | None = None
        self._lock = threading.Lock()
        self.engine: LLMEngine
        self._requests: Requests
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
        self._send(lambda: self._requests.add(number, prepared, sampling, on_report))
        return lambda: self._send(lambda: self._requests.cancel(number), even_if_dead=True)

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
            self._requests = Requests(self.engine)
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
        while self._dead is None and not is_dead(engine):
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
        self._requests.report(outputs)

    def _end(self) -> None:
        error = GarserveError(f"the engine has stopped: {self._dead}")
        while not self._inbox.empty():
            if (command := self._inbox.get()) is not None:
                with suppress(Exception):  # whoever waits is told below
                    command()
        self._requests.fail(error)
        self.engine.engine_core.shutdown()
        del self.engine, self._requests


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
