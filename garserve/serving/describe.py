"""POST /v1/regions/describe: one image and any number of regions, a caption for each as it is done."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from garserve.errors import InputError
from garserve.generation import Sampling
from garserve.inputs.processor import PreparedRequest
from garserve.inputs.regions import Region
from garserve.serving import metrics
from garserve.serving.answering import DONE, as_api_error, attended, deadline_in, event, read_body, stream_response
from garserve.serving.errors import APIError
from garserve.serving.openapi import documented
from garserve.serving.preparation import Picture, check_count
from garserve.serving.routes import Route
from garserve.serving.schemas import DescribeRequest, Descriptions
from garserve.serving.service import Service, note, request_id, service
from garserve.vllm_plugin.arguments import sampling_params
from garserve.vllm_plugin.items import engine_input

router = APIRouter(route_class=Route)
_ENDED = object()


@router.post(
    "/v1/regions/describe",
    **documented(DescribeRequest, answer=Descriptions, stream=True, summary="Describe each region of an image"),
)
async def describe_regions(raw_request: Request) -> Response:
    """Describe every region by itself.

    A region that does not fit the image has an `error` in the place of its text; where none fits, the answer is the
    first one's error. With `stream`, each event has a region's `index` and a `delta` of its text, or, when it is done,
    the whole `text` with its `finish_reason`; regions end in any order.
    """
    own = service(raw_request)
    body = await read_body(raw_request, DescribeRequest)
    own.check_model(body.model)
    own.check_seed(body.seed, body.temperature)
    deadline = deadline_in(own.settings.request_seconds)
    job = _Job(own, body, raw_request)
    if body.stream:
        first = await attended(raw_request, job.begin(), deadline)
        return stream_response(raw_request, job.events(first), deadline, on_end=job.end)
    return JSONResponse(await attended(raw_request, job.whole(), deadline))


class _Job:
    """The regions of one request on their way through the engine, a few at a time."""

    def __init__(self, own: Service, body: DescribeRequest, raw_request: Request) -> None:
        self._own, self._body, self._request = own, body, raw_request
        self._id = f"desc-{request_id(raw_request)}"
        self._model = body.model or own.model_names[0]
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._work: asyncio.Task[None] | None = None
        self._unprepared = 0

    async def begin(self) -> list[dict[str, Any]]:
        """Start, and return the first results, up to one that is no error. Raises APIError where all are errors."""
        async with AsyncExitStack() as stack:
            try:
                picture, regions = await self._open(stack)
            except Exception as error:  # every kind becomes an answer
                raise as_api_error(error, self._request) from None
            note(self._request, regions=len(regions))
            metrics.regions.labels("describe").inc(len(regions))
            self._work = asyncio.ensure_future(self._describe_all(picture, regions, stack.pop_all()))
        first: list[dict[str, Any]] = []
        try:
            while (result := await self._queue.get()) is not _ENDED:
                if isinstance(result, APIError):
                    raise result
                first.append(result)
                if "error" not in result:
                    return first
        except BaseException:
            await self.end()
            raise
        lowest = min(first, key=lambda result: int(result["index"]))
        raise APIError(400, lowest["error"]["message"], code=lowest["error"]["code"], param=lowest["error"]["param"])

    async def events(self, first: Sequence[dict[str, Any]]) -> AsyncGenerator[str]:
        """Yield an event for each piece and each result."""
        async with aclosing(self._results(first)) as results:
            async for result in results:
                yield event({"id": self._id, **result})
        yield DONE

    async def whole(self) -> dict[str, Any]:
        """Return all results as one answer."""
        first = await self.begin()
        async with aclosing(self._results(first)) as results:
            found = [result async for result in results if "delta" not in result]
        found.sort(key=lambda result: int(result["index"]))
        counts = {name: sum(result.get(name, 0) for result in found) for name in ("prompt_tokens", "completion_tokens")}
        note(self._request, **counts)
        return {
            "id": self._id,
            "object": "regions.descriptions",
            "created": int(time.time()),
            "model": self._model,
            "descriptions": found,
            "usage": {**counts, "total_tokens": sum(counts.values())},
        }

    async def _results(self, first: Sequence[dict[str, Any]]) -> AsyncGenerator[dict[str, Any]]:
        try:
            for result in first:
                yield result
            while (result := await self._queue.get()) is not _ENDED:
                if isinstance(result, APIError):
                    raise result
                yield result
        finally:
            await self.end()

    async def end(self) -> None:
        """Cancel what is in work, if anything is, and wait for its end."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)

    async def _open(self, stack: AsyncExitStack) -> tuple[Picture, list[Region | str]]:
        given, most = self._body.regions, self._own.settings.max_regions
        if given is not None:
            check_count(given, most)
        opening = self._own.preparer.picture(self._body.image, alpha=given is None)
        picture = await stack.enter_async_context(opening)
        return picture, await self._own.preparer.run(self._own.preparer.regions, given, picture, most)

    async def _describe_all(self, picture: Picture, regions: Sequence[Region | str], opened: AsyncExitStack) -> None:
        places = asyncio.Semaphore(self._own.settings.describe_in_flight)
        self._unprepared = len(regions)
        try:
            async with opened, asyncio.TaskGroup() as group:
                for index, region in enumerate(regions):
                    await places.acquire()
                    task = group.create_task(self._describe(index, picture, region, opened))
                    task.add_done_callback(lambda _: places.release())
                del picture
        except BaseExceptionGroup as failed:
            worst = next(error for error in failed.exceptions if isinstance(error, Exception))
            self._queue.put_nowait(as_api_error(worst, self._request))
        else:
            self._queue.put_nowait(_ENDED)

    async def _describe(self, index: int, picture: Picture, region: Region | str, opened: AsyncExitStack) -> None:
        async with self._own.region_places:
            prepared = await self._prepare(index, picture, region)
            del picture
            self._unprepared -= 1
            if self._unprepared == 0:  # captions need no pixels: others may have their room
                await opened.aclose()
            if prepared is not None:
                await self._caption(index, prepared)

    async def _prepare(self, index: int, picture: Picture, region: Region | str) -> PreparedRequest | None:
        """Prepare one region; one that cannot be used has its error for a result, and is None."""
        own = self._own
        try:
            prepared = await own.preparer.run(own.preparer.prepare, picture, [region])
            own.check_length(len(prepared.token_ids), "regions[0]")
        except (InputError, APIError) as refused:
            error = as_api_error(refused, self._request).body()["error"]
            error["message"] = error["message"].replace("regions[0]", f"regions[{index}]")
            self._queue.put_nowait({"index": index, "error": {**error, "param": f"regions[{index}]"}})
            return None
        return prepared

    async def _caption(self, index: int, prepared: PreparedRequest) -> None:
        own, body, tokens = self._own, self._body, len(prepared.token_ids)
        room = min(body.max_tokens, own.max_model_len - tokens)
        sampling = sampling_params(Sampling(own.stop_id, room, body.temperature, body.seed, stream=body.stream))
        name = f"{self._id}-{index}"
        text, count = "", 0
        async with aclosing(own.engine.generate(engine_input(prepared), sampling, name)) as outputs:
            async for output in outputs:
                completion = output.outputs[0]
                text += completion.text
                count += len(completion.token_ids)
                if completion.finish_reason is None:
                    if completion.text:
                        self._queue.put_nowait({"index": index, "delta": completion.text})
                    continue
                if body.stream and completion.text:
                    self._queue.put_nowait({"index": index, "delta": completion.text})
                counts = {"prompt_tokens": tokens, "completion_tokens": count}
                done = {"index": index, "text": text, "finish_reason": completion.finish_reason}
                self._queue.put_nowait({**done, **counts})
