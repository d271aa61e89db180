"""The requests that vLLM's engine has: handed over, reported on, cancelled. All of it in the engine's thread."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from garserve.errors import GarserveError, RequestError
from garserve.generation import OnReport, Progress, Sampling, deliver
from garserve.inputs.processor import PreparedRequest
from garserve.tracing import span
from garserve.vllm_plugin.arguments import sampling_params

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


@dataclass
class _Running:
    on_report: OnReport
    engine_id: str | None = None
    again: Callable[[], object] | None = None  # hands it over once more, where not all of its items were sent


class Requests:
    """What an engine has been asked, by number, and who is told about it."""

    def __init__(self, engine: "LLMEngine") -> None:
        self._engine = engine
        self._running: dict[str, _Running] = {}

    def add(self, number: str, prepared: PreparedRequest, sampling: Sampling, on_report: OnReport) -> None:
        """Give a request to vLLM, or report why it cannot be."""
        running = _Running(on_report)
        if not self._hand_over(number, running, prepared, sampling):
            running.again = partial(self._hand_over, number, running, prepared, sampling)

    def cancel(self, number: str) -> None:
        """Take a request back, of which nothing more is said. One that has ended, or never was, may be named."""
        running = self._running.pop(number, None)
        if running is not None:
            self._abort(running)

    def report(self, outputs: Iterable[Any]) -> None:
        """Tell what a step of the engine has brought."""
        for output in outputs:
            if (running := self._running.get(output.request_id)) is None:
                continue
            if output.finished:
                del self._running[output.request_id]
                if (reason := output.outputs[0].finish_reason) not in ("stop", "length"):
                    self._given_up(running, reason)
                    continue
            running.again = None
            if not deliver(running.on_report, _progress(output)) and not output.finished:
                # Nobody listens any more (an event loop that was closed, say): the others must not suffer for it.
                self.cancel(output.request_id)

    def fail(self, error: GarserveError) -> None:
        """Report the engine's end to all that still run."""
        for running in self._running.values():
            deliver(running.on_report, error)
        self._running.clear()

    def _hand_over(self, number: str, running: _Running, prepared: PreparedRequest, sampling: Sampling) -> bool:
        """Give a request to vLLM, or report why it cannot be; return whether all of its items went with it."""
        self._running[number] = running
        try:
            with span("hand over"):
                running.engine_id, sent = self._add(number, prepared, sampling)
        except Exception as error:  # vLLM refuses requests with several kinds of error
            del self._running[number]
            if is_dead(self._engine):
                deliver(running.on_report, GarserveError(f"the engine has stopped: {error}"))
                return True
            with suppress(Exception):  # it may be known to vLLM in part already
                self._engine.abort_request([number])
            deliver(running.on_report, RequestError(f"refused by vLLM: {error}"))
            return True
        return sent

    def _add(self, number: str, prepared: PreparedRequest, sampling: Sampling) -> tuple[str, bool]:
        from garserve.vllm_plugin.items import engine_input, share_with_engine

        prompt = engine_input(prepared)
        cache = self._engine.renderer.mm_processor_cache
        new = [item.hash for item in prepared.items] if cache is None else share_with_engine(cache, prompt)
        try:
            engine_id = self._engine.add_request(number, prompt, sampling_params(sampling))
        except Exception:
            for item_hash in new if cache is not None else ():  # the engine never saw these; the others it has
                cache.invalidate(item_hash)
            raise
        return engine_id, len(new) == len(prepared.items)

    def _abort(self, running: _Running) -> None:
        if running.engine_id is not None:
            self._engine.abort_request([running.engine_id], internal=True)

    def _given_up(self, running: _Running, reason: str | None) -> None:
        """Report a request that vLLM ended by itself, or hand it over a second and last time.

        That is for one whose items were not all sent, where the engine had let go of one of them: vLLM tells no more
        than "error", and has noted what is missing, so that it is sent now.
        """
        again, running.again = running.again, None
        if reason == "error" and again is not None:
            again()
        elif reason == "abort":
            deliver(running.on_report, GarserveError("the engine was told to stop"))
        else:
            deliver(running.on_report, RequestError(f"vLLM gave this request up (finish reason: {reason})"))


def is_dead(engine: "LLMEngine") -> bool:
    """Say whether vLLM has seen its engine process die; in this process there is none."""
    return bool(getattr(getattr(engine.engine_core, "resources", None), "engine_dead", False))


def _progress(output: Any) -> Progress:
    completion = output.outputs[0]
    return Progress(
        list(completion.token_ids),
        completion.finish_reason if output.finished else None,
        output.num_cached_tokens or 0,
        _first_logits(completion.logprobs),
    )


def _first_logits(logprobs: Any) -> list[float] | None:
    """Return the first step's values in the order of the token ids; raw logits with `logprobs_mode="raw_logits"`."""
    if not logprobs:
        return None
    first = logprobs[0]
    return [first[token].logprob for token in range(len(first))]
