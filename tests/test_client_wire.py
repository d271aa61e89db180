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
from pycocotools import mask as coco

import garserve
from garserve.client_answers import Events
from garserve.client_wire import image_url, region_json
from garserve.errors import ImageError, RegionError, RequestError
from garserve.inputs.images import load_image
from garserve.inputs.regions import Region

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


def encoded_mask() -> dict[str, Any]:
    """pycocotools' own run lengths of a mask [12, 10]: their counts are bytes."""
    mask = np.zeros((12, 10), np.uint8, order="F")
    mask[3:5, 2:7] = 1
    found: dict[str, Any] = coco.encode(mask)
    assert isinstance(found["counts"], bytes)
    return found


@pytest.mark.parametrize(
    "region",
    [
        encoded_mask(),
        {"rle": encoded_mask()},
        {"rle": {"size": np.array([12, 10]), "counts": np.array([20, 30, 70])}},
        Region.from_rle({"size": np.array([12, 10]), "counts": np.array([20, 30, 70])}),
        {"box": np.array([1, 2, 8, 9])},
        {"box": [np.float32(1.5), np.float32(2), np.float32(8), np.float32(9)], "clip": True},
        {"xywh": (np.int64(1), np.int64(2), np.int64(5), np.int64(4))},
        {"polygon": np.array([[1, 1], [8, 1], [1, 9]])},
        {"polygon": [np.array([1.0, 1, 8, 1, 1, 9])]},
        {"points": np.array([[3, 4], [6, 7]]), "radius": np.float64(2)},
        {"scribble": [np.array([3, 4]), np.array([6, 7])], "width": np.float64(2)},
        {"box": range(1, 5)},
        np.array([1, 2, 8, 9]),
    ],
)
def test_what_the_engine_takes_is_sent(region: Any) -> None:
    """Numbers and arrays of NumPy, and bytes: what the server reads draws the same."""
    bodies: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json={"descriptions": [{"index": 0, "text": "red"}]})

    with client(answer) as asked:
        assert [item.text for item in asked.describe(PIXELS, [region])] == ["red"]
    assert (Region.parse(bodies[0]["regions"][0]).mask(12, 10) == Region.parse(region).mask(12, 10)).all()


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"box": [0, 0, float("nan"), 9]}, r"box: expected finite numbers"),
        ({"box": {0, 9}}, r"box: expected 4 numbers, got 2"),
        ({"box": [0, 0, 9, 9], "clip": object()}, r"box: clip: expected true or false, got <object"),
        (
            {"points": [[1, 1]], "radius": float("nan")},
            "points: expected finite numbers, lists and text, got",
        ),
        ({"rle": {"size": [12, 10], "counts": b"\xff"}}, r"rle: expected finite numbers, lists and text"),
        ({"rle": object()}, r"rle: expected finite numbers, lists and text, got \{'rle': <object"),
    ],
)
def test_a_region_that_json_cannot_hold_is_refused_by_name(region: Any, message: str) -> None:
    with pytest.raises(RegionError, match=message):
        region_json(region)


@pytest.mark.parametrize(("kind", "value"), [("JPEG", None), ("PNG", 7), ("PNG", None)])
def test_a_mask_in_a_data_url_is_sent_as_the_server_takes_it(kind: str, value: int | None) -> None:
    """As a PNG of what is inside, where it is another picture, or one of labels."""
    labels = np.zeros((12, 10), np.uint8)
    labels[3:5, 2:7], labels[8:, 8:] = 200, 7
    file = io.BytesIO()
    Image.fromarray(labels).save(file, kind)
    url = f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()
    region = {"mask": url} if value is None else {"mask": url, "value": value}
    sent = region_json(region)
    assert list(sent) == ["mask"]
    assert sent["mask"].startswith("data:image/png;base64,")
    assert (sent == region) is (kind == "PNG" and value is None)
    assert (Region.parse(sent).mask(12, 10) == Region.parse(region).mask(12, 10)).all()


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"mask": "data:image/jpeg;base64,AAAA"}, "mask: image data URL: not an image"),
        ({"mask": "data:image/png;base64,AAAA", "box": [0, 0, 9, 9]}, "exactly one of"),
        ({"mask": "data:image/png;base64,AAAA", "value": "7"}, "mask: value: expected a number, got '7'"),
    ],
)
def test_a_mask_that_cannot_be_drawn_is_refused_by_name(region: Any, message: str) -> None:
    with pytest.raises(RegionError, match=message):
        region_json(region)


def test_every_body_says_that_it_is_json() -> None:
    kinds: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        kinds.append(request.headers["Content-Type"])
        return httpx.Response(200, content=lines())

    with client(answer) as asked:
        assert list(asked.stream_describe(PIXELS, BOX)) == list(asked.stream_ask(PIXELS, BOX)) == []
        for ask in (asked.describe, asked.ask):
            with pytest.raises(garserve.ServerError):
                ask(PIXELS, BOX)
    assert kinds == ["application/json"] * 4


def test_json_goes_as_it_is() -> None:
    """What is wrong with it is the server's to say, for this one region only."""
    for region in ({"box": [1]}, {"other": "Ü"}, {"points": [[1, 2.5]], "radius": None}):
        assert region_json(region) == region


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


@pytest.mark.parametrize("ask", ["describe", "stream_describe", "ask", "stream_ask"])
@pytest.mark.parametrize(
    "answer",
    [
        {"html": "<html>Log in, please</html>"},
        {"json": {"status": "ok"}},
        {"json": [1]},
        {"json": {"descriptions": None, "choices": []}},
        {"json": {"descriptions": [{"text": "whose?"}], "choices": [{"message": None}]}},
        {"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}},
    ],
    ids=lambda answer: str(answer)[:40],
)
def test_another_servers_answer_is_told(ask: str, answer: dict[str, Any]) -> None:
    made = client(lambda _: httpx.Response(200, **answer))
    with made as asked, pytest.raises(garserve.ServerError, match="200: expected ") as told:
        list(getattr(asked, ask)(PIXELS, BOX))
    assert told.value.status == 200


@pytest.mark.parametrize("ask", ["stream_describe", "stream_ask"])
@pytest.mark.parametrize("event", ["{broken", "[1]", "null", '{"choices": [1]}', '{"choices": [{}]}'])
def test_an_event_that_is_none_is_told(ask: str, event: str) -> None:
    body = f"data: {event}\n\ndata: [DONE]\n\n".encode()
    made = client(lambda _: httpx.Response(200, content=body))
    with made as asked, pytest.raises(garserve.ServerError, match="200: expected "):
        list(getattr(asked, ask)(PIXELS, BOX))


def test_an_error_in_a_stream_may_be_a_text() -> None:
    with pytest.raises(garserve.ServerError, match="503: out of memory"):
        stream(lines({"error": "out of memory"}))


def test_a_key_is_what_the_server_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the end of the line of the file it came from; and what cannot be sent is not shown."""
    monkeypatch.setenv("GARSERVE_API_KEY", " secret\n")
    for given in (None, "secret\r\n", "  "):
        with garserve.Client("http://server", api_key=given) as made:
            assert made._http.headers["Authorization"] == "Bearer secret"
    for wrong in ("sec\nret", "secr\u00e9t", "secret\x7f"):
        with pytest.raises(RequestError, match="api_key: expected printable ASCII characters") as told:
            garserve.Client("http://server", api_key=wrong)
        assert "sec" not in str(told.value)
    monkeypatch.setenv("GARSERVE_API_KEY", "\n")
    with garserve.Client("http://server") as made:
        assert "Authorization" not in made._http.headers


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
    with pytest.raises(garserve.ServerError, match="200: expected a JSON object, got b'<html>"):
        asyncio.run(pieces(lambda _: httpx.Response(200, html="<html>Log in</html>")))
    with pytest.raises(garserve.ServerError, match="ended before the answer did"):
        asyncio.run(pieces(lambda _: httpx.Response(200, content=whole[:-20])))
    with pytest.raises(garserve.ServerError, match="no answer: ConnectError"):
        asyncio.run(pieces(fail))
