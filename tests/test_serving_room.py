"""What bounds a server's memory, and what it does for pictures only once."""

import asyncio
import base64
import io
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from garserve.checkpoint import resolve
from garserve.config import read_config
from garserve.errors import ImageError
from garserve.inputs import processor as processors
from garserve.inputs.processor import Processor

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")


@pytest.fixture
def processor() -> Processor:
    folder = resolve("tiny")
    return Processor(folder, read_config(folder))


def data_url(width: int, height: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_room_is_given_in_turn_and_never_more_than_there_is() -> None:
    from garserve.serving.admission import PixelBudget

    async def many() -> None:
        budget, began, most = PixelBudget(100), [], 0
        sizes = [60, 30, 90, 10, 500, 10, 100]

        async def one(number: int, size: int) -> None:
            nonlocal most
            async with budget.room(size):
                began.append(number)
                most = max(most, budget.held if budget.held != 500 else 0)
                await asyncio.sleep(0.001)

        await asyncio.gather(*(one(number, size) for number, size in enumerate(sizes)))
        assert began == list(range(len(sizes)))
        assert most <= 100
        assert budget.held == 0

    asyncio.run(many())


def test_room_is_given_back_by_whoever_leaves_or_gives_up() -> None:
    from garserve.serving.admission import PixelBudget

    async def some() -> None:
        budget = PixelBudget(100)
        with pytest.raises(KeyError):
            async with budget.room(100):
                raise KeyError
        async with budget.room(80):
            rooms = budget.room(50), budget.room(20)
            waits, following = (asyncio.ensure_future(room.__aenter__()) for room in rooms)
            await asyncio.sleep(0)
            assert not following.done(), "nobody passes those who wait"
            waits.cancel()
            await following
            assert budget.held == 100

    asyncio.run(some())


def test_pictures_wait_for_room_before_they_are_decoded(processor: Processor) -> None:
    from garserve.serving.preparation import Preparer
    from garserve.serving.settings import Settings

    async def some() -> None:
        preparer = Preparer(processor, Settings(max_pixels_in_work=5_000, max_pixels=10_000))
        async with preparer.picture(data_url(50, 60)) as first:
            assert not first.pixels.flags.writeable
            opening = preparer.picture(data_url(50, 50))
            second = asyncio.ensure_future(opening.__aenter__())
            await asyncio.sleep(0.05)
            assert not second.done()
        assert (await second).pixels.shape == (50, 50, 3)
        with pytest.raises(ImageError, match="101x100 pixels; refused"):
            async with preparer.picture(data_url(101, 100)):
                pass
        assert preparer._budget.held == 2_500
        await opening.__aexit__(None, None, None)
        assert preparer._budget.held == 0
        preparer.close()

    asyncio.run(some())


class Engine:
    """Answers with one token each; stops before the answer where `let` is not set, and fails where told."""

    def __init__(self, *, fails: bool = False) -> None:
        self.let, self.fails, self.asked = asyncio.Event(), fails, 0

    async def generate(self, *_: Any) -> AsyncIterator[Any]:
        self.asked += 1
        await self.let.wait()
        if self.fails:
            raise RuntimeError
        yield SimpleNamespace(outputs=[SimpleNamespace(text="red", token_ids=[1], finish_reason="stop")])


def description(processor: Processor, engine: Engine, regions: int) -> tuple[Any, Any]:
    """A description of so many regions of a picture of 50 x 60, and the service that it is made with."""
    from garserve.serving.describe import _Job
    from garserve.serving.preparation import Preparer
    from garserve.serving.schemas import DescribeRequest
    from garserve.serving.service import Service
    from garserve.serving.settings import Settings

    settings = Settings(describe_in_flight=4, regions_in_flight=3)
    made: dict[str, Any] = {"admission": None, "chat": None, "engine": engine, "stop_id": 1, "model_names": ["tiny"]}
    own = Service(settings=settings, preparer=Preparer(processor, settings), max_model_len=4096, **made)
    body = DescribeRequest(image=data_url(50, 60), regions=[{"box": [1, 1, 9 + i, 9]} for i in range(regions)])
    request: Any = SimpleNamespace(scope={"garserve.request_id": "r"})
    return _Job(own, body, request), own


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.005)


def test_a_description_has_room_until_its_regions_are_prepared(processor: Processor) -> None:
    async def some() -> None:
        engine = Engine()
        job, own = description(processor, engine, 3)
        work = asyncio.ensure_future(job.whole())
        await until(lambda: engine.asked == 3)
        assert own.preparer._budget.held == 0, "captions need no pixels"
        engine.let.set()
        assert [item["text"] for item in (await work)["descriptions"]] == ["red"] * 3
        own.preparer.close()

    asyncio.run(some())


def test_regions_of_all_descriptions_share_their_places(processor: Processor) -> None:
    async def some() -> None:
        engine = Engine()
        job, own = description(processor, engine, 5)
        work = asyncio.ensure_future(job.whole())
        await until(lambda: engine.asked == 3)
        await asyncio.sleep(0.1)
        assert engine.asked == 3
        assert own.preparer._budget.held == 3_000, "two regions are not prepared yet"
        engine.let.set()
        assert len((await work)["descriptions"]) == 5
        assert (own.preparer._budget.held, own.region_places._value) == (0, 3)
        own.preparer.close()

    asyncio.run(some())


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
def test_a_description_gives_its_room_back_however_it_ends(processor: Processor, how: str) -> None:
    from garserve.serving.errors import APIError

    async def some() -> None:
        engine = Engine(fails=how == "fails")
        job, own = description(processor, engine, 5)
        work = asyncio.ensure_future(job.whole())
        await until(lambda: engine.asked == 3)
        if how == "fails":
            engine.let.set()
            with pytest.raises(APIError):
                await work
        else:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        await until(lambda: own.preparer._budget.held == 0 and own.region_places._value == 3)
        own.preparer.close()

    asyncio.run(some())


class Slow(Engine):
    """Answers about the first region that it is asked about, and about no other before it is let."""

    async def generate(self, *_: Any) -> AsyncIterator[Any]:
        if self.asked == 0:
            self.let.set()
        else:
            self.let.clear()
        async for output in super().generate():
            yield output


@pytest.mark.parametrize("version", ["2.0", "2.4"])
@pytest.mark.parametrize("stuck_at", ["http.response.start", "http.response.body"])
def test_a_description_of_which_nothing_is_taken_leaves_nothing_in_work(
    processor: Processor, version: str, stuck_at: str
) -> None:
    """Wherever its client stalls: before any event has been asked for, too."""
    from fastapi import FastAPI

    from garserve.serving import describe
    from garserve.serving.admission import Admission
    from garserve.serving.gate import Gate
    from garserve.serving.settings import Settings

    job, own = description(processor, Slow(), 5)
    body = job._body.model_copy(update={"stream": True}).model_dump_json().encode()
    admission, app = Admission(1), FastAPI()
    app.state.garserve = own
    app.include_router(describe.router)
    app.add_middleware(Gate, settings=Settings(send_seconds=0.05), admission=admission)
    parts = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        if not parts:
            await asyncio.Event().wait()
        return parts.pop()

    async def send(message: Any) -> None:
        if message["type"] == stuck_at:
            await asyncio.Event().wait()

    async def ask() -> None:
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/regions/describe", "query_string": b""}
        scope |= {"headers": [(b"content-type", b"application/json")], "asgi": {"spec_version": version}}
        await asyncio.wait_for(app(scope, receive, send), 60)
        assert scope["garserve.facts"]["stalled"]
        assert (own.region_places._value, own.preparer._budget.held, admission.in_work) == (3, 0, 0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        own.preparer.close()

    asyncio.run(ask())


def test_variables_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from garserve.errors import RequestError
    from garserve.serving.settings import Settings

    monkeypatch.setenv("GARSERVE_SERVE_REGIONS_IN_FLIGHT", "7")
    monkeypatch.setenv("GARSERVE_SERVE_API_KEYS", "a, b")
    monkeypatch.setenv("GARSERVE_SERVE_PREPARE_THREADS", "0")
    found = Settings.from_environment(given=["max_queue"])
    assert (found.regions_in_flight, found.api_keys, found.prepare_threads) == (7, ("a", "b"), 0)
    for value in ("0", "-1", "x", "1.5"):
        monkeypatch.setenv("GARSERVE_SERVE_REGIONS_IN_FLIGHT", value)
        with pytest.raises(RequestError, match="GARSERVE_SERVE_REGIONS_IN_FLIGHT: expected"):
            Settings.from_environment()
    monkeypatch.delenv("GARSERVE_SERVE_REGIONS_IN_FLIGHT")
    monkeypatch.setenv("GARSERVE_SERVE_MAX_QUEUE", "7")
    assert Settings.from_environment().max_queue == 7
    with pytest.raises(RequestError, match="GARSERVE_SERVE_MAX_QUEUE: has an option of garserve serve"):
        Settings.from_environment(given=["max_queue"])


def test_threads_that_want_the_same_tiles_make_them_once(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    made, go, real = [], Event(), processors.tile_image

    def slow(*arguments: Any) -> Any:
        made.append(1)
        assert go.wait(30)
        return real(*arguments)

    monkeypatch.setattr(processors, "tile_image", slow)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(processor._tiled, image) for _ in range(4)]
        go.set()
        tiles = [one.result() for one in found]
    assert len(made) == 1
    assert all(one is tiles[0] for one in tiles)


def test_tiles_that_could_not_be_made_are_tried_again(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.zeros((30, 20, 3), np.uint8)

    def no_memory(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(processors, "tile_image", no_memory)
        for _ in range(2):
            with pytest.raises(MemoryError):
                processor._tiled(image)
    assert len(processor._tiled(image).digests) == len(processor._tiled(image).image.tiles)


def test_an_answers_message_may_be_sent_back() -> None:
    from pydantic import ValidationError

    from garserve.serving.schemas import Message

    nothing = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": []}
    sent = {"role": "assistant", "content": "red", **nothing, "reasoning": None, "reasoning_content": None}
    assert Message.model_validate(sent).text() == "red"
    for field, value in (("refusal", "no"), ("tool_calls", [{}]), ("annotations", [1]), ("reasoning", "hm")):
        with pytest.raises(ValidationError, match=field):
            Message.model_validate({**sent, field: value})


def test_a_key_may_end_its_line_and_a_blank_one_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.datastructures import Headers

    from garserve.serving.errors import APIError
    from garserve.serving.gate import Keys
    from garserve.serving.settings import keys_of_environment

    monkeypatch.setenv("GARSERVE_API_KEY", "secret\n")
    monkeypatch.setenv("VLLM_API_KEY", " ")
    assert keys_of_environment() == ("secret",)
    keys = Keys(keys_of_environment())
    keys.check(Headers({"authorization": "Bearer secret"}))
    with pytest.raises(APIError):
        keys.check(Headers({"authorization": "Bearer "}))


def test_a_path_cannot_forge_a_line_of_the_log() -> None:
    from garserve.serving.logs import Words

    record = logging.LogRecord("garserve", logging.INFO, "", 0, "request", None, None)
    record.fields = {"path": "/a\nerror engine lost", "status": 404}
    assert Words().format(record) == "info request path='/a\\nerror engine lost' status=404"
