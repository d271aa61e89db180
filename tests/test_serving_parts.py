"""Parts of the server by themselves: texts in pieces, readiness, the queue, settings, the alpha channel."""

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from garserve.checkpoint import resolve
from garserve.config import read_config
from garserve.errors import RequestError
from garserve.inputs.images import load_image, load_with_alpha
from garserve.inputs.processor import Processor
from garserve.inputs.prompts import stop_token_id

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")


@pytest.fixture(scope="module")
def processor() -> Processor:
    folder = resolve("tiny")
    return Processor(folder, read_config(folder))


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.integers(0, 901), max_size=30), cuts=st.lists(st.integers(1, 4), min_size=31), ended=st.booleans()
)
def test_pieces_of_a_text_are_the_text(processor: Processor, ids: list[int], cuts: list[int], ended: bool) -> None:
    """Whatever tokens come in whatever portions, bytes of half characters and control tokens among them."""
    from garserve.inputs.text_stream import TextStream

    stop = stop_token_id(processor.tokenizer)
    ids = [token for token in ids if token != stop]
    stream = TextStream(processor.tokenizer, stop)
    tokens, pieces = ids + [stop] * ended, []
    while tokens:
        portion, tokens = tokens[: cuts[0]], tokens[cuts.pop(0) :]
        pieces.append(stream.push(portion, finished=not tokens))
    assert "".join(pieces) == (processor.tokenizer.decode(ids) if pieces else "")


class Engine:
    """Stands for the engine client: answers when it is let."""

    def __init__(self) -> None:
        self.let, self.errored = asyncio.Event(), False

    async def generate(self, *_: Any) -> AsyncIterator[None]:
        await self.let.wait()
        yield None

    async def collective_rpc(self, _: str) -> list[dict[str, int]]:
        return [{"asked": 5, "computed": 3}]


def test_ready_only_after_the_warm_up_and_not_without_an_engine(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from garserve.serving import lifecycle as lifecycles
    from garserve.serving.admission import Admission
    from garserve.serving.lifecycle import Lifecycle
    from garserve.serving.preparation import Preparer
    from garserve.serving.settings import Settings

    monkeypatch.setattr(lifecycles, "_LAST_WORDS_SECONDS", 0.2)

    async def life() -> None:
        given = Settings(drain_seconds=0.2)
        own: Any = SimpleNamespace(
            settings=given,
            admission=Admission(4),
            preparer=Preparer(processor, given),
            engine=Engine(),
            stop_id=1,
            model_names=["tiny"],
        )
        server = SimpleNamespace(should_exit=False, force_exit=False)
        lifecycle = Lifecycle(own, SimpleNamespace(server=server))  # type: ignore[arg-type]
        async with lifecycle.running():
            await asyncio.sleep(0.3)
            assert lifecycle.state_of_health() == (True, "warming up")
            own.engine.let.set()
            async with asyncio.timeout(30):
                while lifecycle.state_of_health() != (True, None):
                    await asyncio.sleep(0.01)
            own.admission.enter()
            own.engine.errored = True
            async with asyncio.timeout(30):
                while not server.should_exit:
                    assert lifecycle.state_of_health() == (False, own.admission.closed or "the engine has stopped")
                    await asyncio.sleep(0.01)
            assert server.force_exit, "somebody is still in work, and is not waited for"

    asyncio.run(life())


def test_the_queue_counts_and_closes() -> None:
    from garserve.serving.admission import Admission
    from garserve.serving.errors import APIError

    async def queue() -> None:
        admission = Admission(2)
        admission.enter()
        admission.enter()
        with pytest.raises(APIError, match="2 requests are in work") as full:
            admission.enter()
        assert (full.value.status, full.value.headers["Retry-After"]) == (429, "1")
        assert not await admission.idle(0.01)
        admission.close("going down")
        admission.leave()
        admission.leave()
        assert await admission.idle(0.01)
        with pytest.raises(APIError, match="not taken: going down"):
            admission.enter()

    asyncio.run(queue())


@pytest.mark.parametrize(("reason", "status"), [("abort", 503), ("error", 500)])
def test_a_description_that_vllm_ends_by_itself_is_no_caption(processor: Processor, reason: str, status: int) -> None:
    from garserve.serving.decoding import RegionEngineClient
    from garserve.serving.describe import _Job
    from garserve.serving.errors import APIError
    from garserve.serving.schemas import DescribeRequest

    async def generate(*_: Any) -> AsyncIterator[Any]:
        yield SimpleNamespace(outputs=[SimpleNamespace(index=0, text="", token_ids=[1, 2], finish_reason=reason)])

    async def run(*_: Any) -> Any:
        return SimpleNamespace(token_ids=[1] * 9, items=[], spans=[])

    own = SimpleNamespace(
        preparer=SimpleNamespace(run=run, prepare=None),
        settings=SimpleNamespace(describe_in_flight=2),
        check_length=lambda *given: None,
        region_places=asyncio.Semaphore(2),
        engine=RegionEngineClient(SimpleNamespace(generate=generate), processor.tokenizer, 5),
        max_model_len=100,
        stop_id=5,
        model_names=["tiny"],
    )
    body = DescribeRequest(image="data:", regions=[{"box": [0, 0, 1, 1]}])
    job = _Job(own, body, SimpleNamespace(scope={"garserve.request_id": "r"}))  # type: ignore[arg-type]
    asyncio.run(job._describe_all(None, [None], AsyncExitStack()))  # type: ignore[arg-type, list-item]
    result = job._queue.get_nowait()
    assert isinstance(result, APIError)
    assert result.status == status


def test_a_client_that_takes_nothing_of_its_answer_leaves_its_place() -> None:
    from starlette.requests import Request

    from garserve.serving.admission import Admission
    from garserve.serving.answering import stream_response
    from garserve.serving.gate import Gate
    from garserve.serving.settings import Settings

    ended, sent = [], []

    async def events() -> AsyncIterator[str]:
        try:
            while True:
                yield "data: {}\n\n"
        finally:
            ended.append(True)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await stream_response(Request(scope, receive), events(), None)(scope, receive, send)

    async def body() -> dict[str, Any]:
        if sent:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": b"{}"}

    async def stuck(message: Any) -> None:
        sent.append(message)
        if len(sent) == 3:
            await asyncio.Event().wait()  # what a full socket looks like

    async def ask() -> None:
        admission = Admission(1)
        gate = Gate(app, settings=Settings(send_seconds=0.05), admission=admission)
        scope = {"type": "http", "method": "POST", "path": "/v1/regions/describe", "headers": [], "asgi": {}}
        await asyncio.wait_for(gate(scope, body, stuck), 20)
        admission.enter()  # there is room again
        assert scope["garserve.facts"]["stalled"] is True  # type: ignore[index]
        assert ended

    asyncio.run(ask())
    assert len(sent) == 3


def test_settings_of_a_plain_vllm_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    from garserve.serving.settings import Settings

    monkeypatch.setenv("GARSERVE_SERVE_MAX_QUEUE", "7")
    monkeypatch.setenv("GARSERVE_SERVE_IMAGE_HOSTS", "a.example, b.example")
    monkeypatch.setenv("GARSERVE_SERVE_IMAGE_FOLDER", "/images")
    monkeypatch.setenv("GARSERVE_API_KEY", "secret")
    found = Settings.from_environment()
    assert (found.max_queue, found.image_hosts) == (7, ("a.example", "b.example"))
    assert (found.image_folder, found.api_keys) == (Path("/images"), ("secret",))
    monkeypatch.setenv("GARSERVE_SERVE_MAX_QUEUE", "many")
    with pytest.raises(RequestError, match="GARSERVE_SERVE_MAX_QUEUE: expected int, got 'many'"):
        Settings.from_environment()


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB", "opaque"])
def test_the_alpha_channel_is_a_mask_and_the_pixels_stay(kind: str) -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
    alpha = np.zeros((20, 30), np.uint8)
    alpha[5:9, 4:20] = 200
    picture = Image.fromarray(pixels)
    if kind == "P":
        picture = picture.quantize(8)
        picture.info["transparency"] = 0
        alpha = np.asarray(picture) != 0
    elif kind == "LA":
        picture = picture.convert("L")
        picture.putalpha(Image.fromarray(alpha))
    elif kind in ("RGBA", "opaque"):
        picture.putalpha(Image.fromarray(alpha if kind == "RGBA" else alpha | 255))
    file = io.BytesIO()
    picture.save(file, "PNG", transparency=picture.info.get("transparency"))
    found, mask = load_with_alpha(file.getvalue())
    if kind in ("RGB", "opaque"):
        assert mask is None
        assert (found == load_image(file.getvalue())).all()
    else:
        assert mask is not None
        assert (mask == (alpha != 0)).all()
        assert (found == np.asarray(picture.convert("RGBA").convert("RGB"))).all()


@pytest.mark.parametrize(
    ("least", "marks"), [({254}, False), ({1, 128, 200}, False), ({0}, True), ({0, 1, 254}, True)], ids=str
)
def test_alpha_marks_something_where_a_pixel_is_fully_transparent(least: set[int], marks: bool) -> None:
    """As in masks: a soft edge, or one pixel that is not quite opaque, does not make the whole picture the region."""
    alpha = np.full((20, 30), 255, np.uint8)
    for place, value in enumerate(sorted(least)):
        alpha[5, place] = value
    file = io.BytesIO()
    Image.fromarray(np.dstack([np.full((20, 30, 3), 40, np.uint8), alpha])).save(file, "PNG")
    found, mask = load_with_alpha(file.getvalue())
    if marks:
        assert mask is not None
        assert (mask == (alpha != 0)).all()
        assert (found == 40).all(), "as they lie below it"
    else:
        assert mask is None
        assert (found == load_image(file.getvalue())).all()


def test_a_chat_keeps_what_else_vllm_s_renderer_knows() -> None:
    """vLLM 0.33 asks its renderer for more than 0.32 does."""
    from garserve.serving.chat import PreparedChat, region_chat

    renderer = SimpleNamespace(reasoning_effort_map={"none": "low"}, render_chat=None)
    serving: Any = SimpleNamespace(
        online_renderer=renderer, engine_client="vLLM's", chat_completion_stream_generator="vLLM's"
    )
    own: Any = region_chat(serving, "garserve's")  # type: ignore[arg-type]
    assert (serving.engine_client, own.engine_client) == ("vLLM's", "garserve's")
    assert serving.chat_completion_stream_generator == "vLLM's"
    assert own.online_renderer.reasoning_effort_map == {"none": "low"}
    assert renderer.render_chat is None
    request = PreparedChat(messages=[])
    request._engine_input = "input"
    assert asyncio.run(own.online_renderer.render_chat(request)) == ([], ["input"])
