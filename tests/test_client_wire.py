"""garserve's client against answers made up here: what goes out, and every way in which an answer can end."""

import asyncio
import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import garserve
from garserve.client_wire import Events, image_url, region_json
from garserve.errors import ImageError
from garserve.inputs.images import load_image

BOX = [{"box": [0, 0, 9, 9]}]
PIXELS = np.zeros((12, 10, 3), np.uint8)


def client(answer: Callable[[httpx.Request], httpx.Response]) -> garserve.Client:
    made = garserve.Client("http://server")
    made._http = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))
    return made


def lines(*events: Any, end: str = "data: [DONE]\n\n") -> bytes:
    return ("".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events) + end).encode()


def chat_event(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


def sent_pixels(image: Any) -> np.ndarray[Any, Any]:
    return load_image(base64.b64decode(image_url(image).partition(",")[2]))


def turned() -> Image.Image:
    picture = Image.fromarray(np.arange(36, dtype=np.uint8).reshape(3, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    return Image.open(file)


@pytest.mark.parametrize(
    "image",
    [
        turned(),
        Image.new("CMYK", (5, 4), (10, 200, 30, 40)),
        Image.new("RGBA", (5, 4), (10, 200, 30, 40)),
        np.full((4, 5, 3), 40_000, np.uint16),
        np.full((4, 5), 40, np.uint8),
    ],
)
def test_an_image_is_sent_as_the_engine_would_read_it(image: Any) -> None:
    assert (sent_pixels(image) == load_image(image)).all()


def test_an_image_that_is_not_there_is_told() -> None:
    with pytest.raises(ImageError, match=r"gone\.png: cannot be read \(No such file"):
        image_url("gone.png")


def test_a_mask_in_a_file_is_sent(tmp_path: Path) -> None:
    mask = np.zeros((12, 10), bool)
    mask[3:5, 2:7] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    sent = region_json({"mask": str(tmp_path / "mask.png")})
    read = load_image(sent["mask"])[..., 0] > 0
    assert (read == mask).all()
    assert region_json({"mask": sent["mask"]}) == sent


@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_a_text_may_hold_every_end_of_line(size: int) -> None:
    body = lines(chat_event("a\u2028b\u0085"), chat_event("c\r"), end="data: [DONE]\r\n\r\n")
    events = Events()
    found = [event for i in range(0, len(body), size) for event in events.read(body[i : i + size])]
    events.end()
    assert found == [chat_event("a\u2028b\u0085"), chat_event("c\r")]


def stream(body: bytes) -> list[str]:
    with client(lambda _: httpx.Response(200, content=body)) as asked:
        return list(asked.stream_ask(PIXELS, BOX))


def test_a_stream_that_breaks_off_is_no_answer() -> None:
    assert stream(lines(chat_event("half"), chat_event(" and half"))) == ["half", " and half"]
    with pytest.raises(garserve.ServerError, match="no answer: the connection ended before the answer did") as broken:
        stream(lines(chat_event("half"), end=""))
    assert (broken.value.status, broken.value.code) == (None, "incomplete")


@pytest.mark.parametrize(
    ("code", "status"), [("timeout", 504), ("internal_error", 500), ("engine_dead", 503), ("cut_off", 503), (400, 400)]
)
def test_errors_in_a_stream_have_their_status(code: Any, status: int) -> None:
    with pytest.raises(garserve.ServerError, match=f"{status}: no") as refused:
        stream(lines(chat_event("half"), {"error": {"message": "no", "code": code}}))
    assert (refused.value.status, refused.value.code) == (status, code)


def test_an_error_of_one_region_is_its_own() -> None:
    error = {"index": 0, "error": {"message": "regions[0]: box: …", "code": "invalid_request"}}
    body = lines(error, {"index": 1, "text": "red", "finish_reason": "stop"})
    with client(lambda _: httpx.Response(200, content=body)) as asked:
        assert [item.text for item in asked.stream_describe(PIXELS, BOX * 2)] == [None, "red"]


def fail(_: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("Connection refused")


@pytest.mark.parametrize("ask", ["describe", "stream_describe", "ask", "stream_ask"])
def test_a_server_that_is_not_there_is_told(ask: str) -> None:
    with client(fail) as asked, pytest.raises(garserve.ServerError, match="no answer: ConnectError: Connection"):
        list(getattr(asked, ask)(PIXELS, BOX))


def test_the_asynchronous_client_ends_in_the_same_ways() -> None:
    async def pieces(answer: Callable[[httpx.Request], httpx.Response]) -> Sequence[str]:
        asked = garserve.AsyncClient("http://server")
        asked._http = httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(answer))
        async with asked:
            return [piece async for piece in asked.stream_ask(PIXELS, BOX)]

    whole = lines(chat_event("a\u2028b"))
    assert asyncio.run(pieces(lambda _: httpx.Response(200, content=whole))) == ["a\u2028b"]
    with pytest.raises(garserve.ServerError, match="ended before the answer did"):
        asyncio.run(pieces(lambda _: httpx.Response(200, content=whole[:-20])))
    with pytest.raises(garserve.ServerError, match="no answer: ConnectError"):
        asyncio.run(pieces(fail))
