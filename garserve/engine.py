"""garserve's one face: load a checkpoint, describe regions, ask about them, one or a million (floor 5)."""

import asyncio
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from garserve.answers import Answer, Chunk
from garserve.backends import Backend
from garserve.chat import Chat
from garserve.checkpoint import TINY, Checkpoint
from garserve.config import BoxScale
from garserve.errors import GarserveError, InputError, RequestError
from garserve.export.choice import choose_vision, open_vision
from garserve.generation import OnReport, Progress, Report, Sampling
from garserve.inputs.encoded import EncodedImage
from garserve.inputs.images import ImageSource, hold_image
from garserve.inputs.processor import PreparedRequest, Processor
from garserve.inputs.prompts import stop_token_id
from garserve.inputs.request import RegionRequest
from garserve.inputs.text_stream import TextStream
from garserve.model.fingerprint import vision_fingerprint
from garserve.tracing import span

if TYPE_CHECKING:
    from garserve.model.tile_cache import TileCounts

BackendName = Literal["vllm", "reference"]


def load(
    checkpoint: str | Path = TINY,
    backend: BackendName = "vllm",
    *,
    max_num_tiles: int | None = None,
    box_scale: BoxScale | None = None,
    vision_backend: str | None = None,
    vision_model: str | Path | None = None,
    **engine_options: Any,
) -> "Engine":
    """Load a GAR checkpoint (a folder, or a Hugging Face repo id) and return an engine for it.

    Without one, the tiny checkpoint that comes with garserve is loaded: it tells colour, size, place, shape and
    surface of regions, and how two of them lie (MODEL_CARD.md).

    `max_num_tiles` (1 to 36) and `box_scale` override the checkpoint's own. `vision_backend` is what computes tiles:
    "torch", or "onnx" or "onnx:PROVIDER" for the tower in ONNX Runtime; `vision_model` is the folder of `garserve
    export vision` that it takes, by default a float32 export that is made once and kept. Where neither is given it is
    torch, or for a large tower on a CPU what a measurement finds the faster, made once and kept, too.

    `engine_options` go to the backend: for "vllm" its EngineArgs, `separate_process` and `verbose`; for "reference"
    `dtype` and `batch_size`; for both `tile_cache_gb`, the memory for features of tiles (default 0.5 and 0). With
    `separate_process` or several ranks, processes are started that import the main module: a script calls this below
    `if __name__ == "__main__":`.
    Raises RequestError for a backend or an option that does not exist, before anything else is done, CheckpointError
    where the checkpoint is not a whole GAR model, OnnxError where the exported tower cannot be used, or is another
    checkpoint's.
    """
    if backend not in get_args(BackendName):
        raise RequestError(f"backend: expected 'vllm' or 'reference', got {backend!r:.80}")
    if box_scale not in (None, *get_args(BoxScale)):
        raise RequestError(f"box_scale: expected {' or '.join(get_args(BoxScale))}, got {box_scale!r:.80}")
    if backend == "vllm":
        from garserve.vllm_plugin.options import check_options
    else:
        from garserve.model.reference_backend import check_options
    check_options(engine_options)  # now: a checkpoint may have to be fetched, and its tower exported
    opened = Checkpoint.open(checkpoint)
    if box_scale is not None:
        opened = replace(opened, config=opened.config.with_box_scale(box_scale))
    fingerprint = cache(partial(vision_fingerprint, opened))
    processor = Processor(opened.folder, opened.config, max_num_tiles=max_num_tiles, fingerprint=fingerprint)
    dtype = engine_options.get("dtype", "auto" if backend == "vllm" else "float32")
    vision = choose_vision(opened, vision_backend, vision_model, dtype=dtype)
    if backend == "vllm":
        from garserve.vllm_plugin.backend import VLLMBackend

        return Engine(VLLMBackend(opened, max_num_tiles=max_num_tiles, vision=vision, **engine_options), processor)
    from garserve.model.reference_backend import ReferenceBackend

    session = None if vision is None else open_vision(opened, vision)
    return Engine(ReferenceBackend(opened, vision=session, **engine_options), processor)


class Engine:
    """Answers requests about regions of images. Safe to use from several threads; close it, or use `with`."""

    def __init__(self, backend: Backend, processor: Processor) -> None:
        self.backend = backend
        self.processor = processor
        self.stop_id = stop_token_id(processor.tokenizer)

    @property
    def tile_counts(self) -> "TileCounts":
        """What became of the tiles so far: how many were asked for, computed, and found computed before."""
        return self.backend.tile_counts()

    def describe(self, image: ImageSource | EncodedImage, regions: Sequence[Any], **options: Any) -> list[Answer]:
        """Describe each region by itself, in the authors' single-region form; the image is read and tiled once.

        `regions` are Region objects or what Region.parse takes; `options` are fields of RegionRequest. An EncodedImage
        is described as it is, and holds one region.
        """
        if isinstance(image, EncodedImage):
            return list(self.describe_many([RegionRequest(image, regions, **options)]))
        given = RegionRequest(hold_image(image), regions, **options)
        singles = [replace(given, regions=[region]) for region in given.parsed_regions()]
        return list(self.describe_many(singles))

    def ask(self, image: ImageSource | EncodedImage, regions: Sequence[Any], question: str, **options: Any) -> Answer:
        """Answer a question in which `<Prompt0>`, `<Prompt1>`, … name the regions in their order."""
        return next(self.describe_many([RegionRequest(image, regions, question, **options)]))

    def chat(self, image: ImageSource | EncodedImage, regions: Sequence[Any], **options: Any) -> Chat:
        """Start a conversation about the regions of one image; its first question is what is said first."""
        if "question" in options or "turns" in options:
            raise RequestError("chat: takes no question or turns; say them")
        held = image if isinstance(image, EncodedImage) else hold_image(image)
        return Chat(lambda request: next(self.describe_many([request])), RegionRequest(held, regions, **options))

    def describe_many(self, requests: Iterable[RegionRequest], *, in_flight: int = 64) -> Iterator[Answer]:
        """Answer requests in their order, at most `in_flight` at a time; an unusable request raises its error."""
        for outcome in self.outcomes(requests, in_flight=in_flight):
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome

    def outcomes(
        self, requests: Iterable[RegionRequest | InputError], *, in_flight: int = 64
    ) -> Iterator[Answer | GarserveError]:
        """Like `describe_many`, but an unusable request gives its error in its place, and the others go on.

        An error among the requests is passed through, so that the outcomes stay in step with their sources.
        """
        waiting: deque[_Pending | GarserveError] = deque()
        try:
            for request in requests:
                waiting.append(request if isinstance(request, InputError) else self._start(request))
                if len(waiting) >= in_flight:
                    yield self._finish_first(waiting)
            while waiting:
                yield self._finish_first(waiting)
        finally:
            for pending in waiting:
                if isinstance(pending, _Pending):
                    pending.cancel()

    def submit(
        self,
        prepared: PreparedRequest,
        on_report: OnReport,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Callable[[], None]:
        """Queue what a Processor of this checkpoint has prepared, and return a function that cancels it.

        `on_report` gets one Progress with all tokens, for `finished`, or an exception: an InputError refuses this
        request, any other means that the engine has stopped. It is called from the backend's thread.
        """
        return self.backend.submit(prepared, Sampling(self.stop_id, max_tokens, temperature, seed), on_report)

    def finished(self, prepared: PreparedRequest, last: Progress, ids: list[int] | None = None) -> Answer:
        """Return the answer that ends with a report; `ids` where its tokens came in several."""
        ids = last.new_token_ids if ids is None else ids
        token_ids = ids[:-1] if ids and ids[-1] == self.stop_id else list(ids)
        with span("decode text"):
            text = self.processor.tokenizer.decode(token_ids)
        return Answer(
            text=text,
            token_ids=token_ids,
            finish_reason=last.finish_reason or "stop",
            prompt_tokens=len(prepared.token_ids),
            cached_tokens=last.cached_tokens,
        )

    async def generate(self, request: RegionRequest) -> AsyncIterator[Chunk]:
        """Answer one request piece by piece; leaving the iteration early cancels the work."""
        prepared = await asyncio.to_thread(self._prepared, request)
        loop = asyncio.get_running_loop()
        reports: asyncio.Queue[Report] = asyncio.Queue()

        def report_here(report: Report) -> None:
            loop.call_soon_threadsafe(reports.put_nowait, report)

        cancel = self.backend.submit(prepared, self._sampling(request, stream=True), report_here)
        ids: list[int] = []
        text = TextStream(self.processor.tokenizer, self.stop_id)
        try:
            while True:
                report = await reports.get()
                if isinstance(report, Exception):
                    raise report
                ids += report.new_token_ids
                finished = self._answer(request, prepared, ids, report) if report.finish_reason else None
                yield Chunk(text.push(report.new_token_ids, finished=finished is not None), finished)
                if finished:
                    return
        finally:
            cancel()

    def close(self) -> None:
        """Stop the backend; requests that still run end with an error."""
        self.backend.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepared(self, request: RegionRequest) -> PreparedRequest:
        try:
            return self.processor(request)
        except InputError:
            raise
        except Exception as error:  # whatever a request holds, the others go on
            raise RequestError(f"request cannot be prepared ({type(error).__name__}: {error})") from error

    def _start(self, request: RegionRequest) -> "_Pending | GarserveError":
        try:
            return _Pending(self, request, self._prepared(request))
        except InputError as error:
            return error

    def _finish_first(self, waiting: "deque[_Pending | GarserveError]") -> Answer | GarserveError:
        """Take the first of those that wait, when it has an answer: until then it is one to cancel."""
        outcome = self._finish(waiting[0])
        waiting.popleft()
        return outcome

    def _finish(self, pending: "_Pending | GarserveError") -> Answer | GarserveError:
        if isinstance(pending, GarserveError):
            return pending
        try:
            return pending.answer()
        except InputError as error:
            return error

    def _sampling(self, request: RegionRequest, *, stream: bool = False) -> Sampling:
        return Sampling(self.stop_id, request.max_tokens, request.temperature, request.seed, stream)

    def _answer(self, request: RegionRequest, prepared: PreparedRequest, ids: list[int], last: Progress) -> Answer:
        return replace(self.finished(prepared, last, ids), id=request.id)


class _Pending:
    """A submitted request that somebody will wait for."""

    def __init__(self, engine: Engine, request: RegionRequest, prepared: PreparedRequest) -> None:
        self._engine, self._request, self._prepared = engine, request, prepared
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self.cancel = engine.backend.submit(prepared, engine._sampling(request), self._reports.put)

    def answer(self) -> Answer:
        """Wait for the end and return the answer; the backend's error is raised."""
        ids: list[int] = []
        while True:
            report = self._reports.get()
            if isinstance(report, Exception):
                raise report
            ids += report.new_token_ids
            if report.finish_reason:
                return self._engine._answer(self._request, self._prepared, ids, report)
