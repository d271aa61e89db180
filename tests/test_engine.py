"""The face: describing, asking, chatting, streaming, many at once; errors in their places."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import garserve
from garserve.answers import Answer
from garserve.engine import Engine
from garserve.errors import GarserveError, ImageError, RegionError, RequestError
from garserve.inputs.request import RegionRequest
from tests.conftest import PHOTO

BOX, DISC = {"box": [5, 5, 60, 50]}, {"points": [[100, 60]], "radius": 12}


@pytest.fixture(params=["reference", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue("reference" if request.param == "reference" else "vllm_engine")


def test_describe_gives_an_answer_a_region(engine: Engine) -> None:
    answers = engine.describe(PHOTO, [BOX, DISC, garserve.Region.from_mask(np.ones((400, 600), bool))], max_tokens=7)
    assert [len(answer.token_ids) for answer in answers] == [7, 7, 7]
    assert len({answer.text for answer in answers}) == 3
    assert all(answer.finish_reason == "length" and answer.text and answer.prompt_tokens > 100 for answer in answers)


def test_chat_is_a_request_with_turns(engine: Engine, picture: np.ndarray) -> None:
    chat = engine.chat(picture, [BOX, DISC], max_tokens=6)
    first = chat.say("How does <Prompt0> relate to <Prompt1>?")
    second = chat.say("And its colour?")
    opening = engine.ask(picture, [BOX, DISC], "How does <Prompt0> relate to <Prompt1>?", max_tokens=6)
    assert first.token_ids == opening.token_ids
    turns = [
        garserve.inputs.request.Turn("assistant", first.text),
        garserve.inputs.request.Turn("user", "And its colour?"),
    ]
    request = RegionRequest(picture, [BOX, DISC], "How does <Prompt0> relate to <Prompt1>?", turns=turns, max_tokens=6)
    assert next(engine.describe_many([request])).token_ids == second.token_ids
    with pytest.raises(RequestError, match="say: expected a text"):
        chat.say()


def test_chat_misused(reference: Engine, picture: np.ndarray) -> None:
    with pytest.raises(RequestError, match="takes no question"):
        reference.chat(picture, [BOX], question="What?")
    chat = reference.chat(picture, [BOX], max_tokens=1)
    for text in (5, "", "half \ud800", "What is <Prompt9>?"):
        with pytest.raises(RequestError, match=r"question|turns"):
            chat.say(text)  # type: ignore[arg-type]
    chat.say("What is <Prompt0>?")
    with pytest.raises(RequestError, match=r"turns\[1\]: expected a text, got 5"):
        chat.say(5)  # type: ignore[arg-type]
    assert chat.say("And <Prompt0>?").token_ids


def test_chat_opens_with_a_description(engine: Engine, picture: np.ndarray) -> None:
    chat = engine.chat(picture, [BOX], max_tokens=4)
    assert chat.say().token_ids == engine.describe(picture, [BOX], max_tokens=4)[0].token_ids
    assert chat.say("More?").prompt_tokens > 0


def test_streaming_gives_the_answer_in_pieces(engine: Engine, picture: np.ndarray) -> None:
    request = RegionRequest(picture, [BOX], max_tokens=16, id="a")

    async def collect() -> list[garserve.Chunk]:
        return [chunk async for chunk in engine.generate(request)]

    chunks = asyncio.run(collect())
    whole = engine.describe(picture, [BOX], max_tokens=16)[0]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[-1].answer is not None
    assert chunks[-1].answer.token_ids == whole.token_ids
    assert chunks[-1].answer.id == "a"
    assert len(chunks) > 4


def test_many_streams_at_once_and_one_left_early(engine: Engine, picture: np.ndarray) -> None:
    async def one(k: int) -> str:
        text = ""
        async for chunk in engine.generate(RegionRequest(picture, [{"box": [k, k, 60 + k, 50]}], max_tokens=8)):
            text += chunk.text
            if k == 3:
                break
        return text

    async def run() -> list[str]:
        return await asyncio.gather(*(one(k) for k in range(6)))

    texts = asyncio.run(run())
    for k in (0, 1, 2, 4, 5):
        assert texts[k] == engine.describe(picture, [{"box": [k, k, 60 + k, 50]}], max_tokens=8)[0].text


def test_an_event_loop_that_is_gone_harms_nobody_else(engine: Engine, picture: np.ndarray) -> None:
    async def leave_early() -> None:
        stream = engine.generate(RegionRequest(picture, [BOX], max_tokens=200))
        reading = asyncio.ensure_future(anext(stream))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        reading.cancel()

    for _ in range(5):
        asyncio.run(leave_early())
    assert len(engine.describe(picture, [BOX], max_tokens=3)[0].token_ids) == 3


def test_many_keeps_order_and_reads_no_further_than_needed(engine: Engine, picture: np.ndarray) -> None:
    drawn: list[int] = []

    def requests():
        for k in range(30):
            drawn.append(k)
            yield RegionRequest(picture, [{"box": [k, 2, 80, 60]}], max_tokens=1 + k % 4, id=str(k))

    answers = engine.describe_many(requests(), in_flight=5)
    first = next(answers)
    assert first.id == "0"
    assert len(drawn) == 5
    rest = list(answers)
    assert [answer.id for answer in rest] == [str(k) for k in range(1, 30)]
    assert [len(answer.token_ids) for answer in rest] == [1 + k % 4 for k in range(1, 30)]


def test_a_wait_that_is_broken_off_cancels_its_request(
    reference: Engine, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C: also the request that was waited for is not decoded to its end for nobody."""
    started: list[int] = []
    cancelled: list[int] = []

    def submit(*_: object) -> Callable[[], None]:
        started.append(number := len(started))
        return lambda: cancelled.append(number)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reference.backend, "submit", submit)
    monkeypatch.setattr("garserve.engine._Pending.answer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reference.describe(picture, [BOX, DISC])
    assert started == cancelled == [0, 1]
    with pytest.raises(KeyboardInterrupt):
        reference.ask(picture, [BOX], "What is <Prompt0>?")
    assert started == cancelled == [0, 1, 2]


def test_outcomes_put_errors_in_their_places(engine: Engine, picture: np.ndarray) -> None:
    requests = [
        RegionRequest(picture, [BOX], max_tokens=2),
        RegionRequest("/nowhere.png", [BOX]),
        RegionRequest(picture, [{"box": [500, 1, 600, 9]}]),
        RequestError("from the source"),
        RegionRequest(picture, [DISC], max_tokens=2),
    ]
    outcomes = list(engine.outcomes(requests))
    assert [type(outcome) for outcome in outcomes] == [Answer, ImageError, RegionError, RequestError, Answer]
    with pytest.raises(ImageError, match="nowhere"):
        list(engine.describe_many(requests[:2]))


def test_threads_share_an_engine(engine: Engine, picture: np.ndarray) -> None:
    expected = {k: engine.describe(picture, [{"box": [k, 2, 80, 60]}], max_tokens=5)[0].text for k in range(6)}
    found: dict[int, str] = {}

    def work(k: int) -> None:
        found[k] = engine.describe(picture, [{"box": [k, 2, 80, 60]}], max_tokens=5)[0].text

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_temperature(engine: Engine, picture: np.ndarray) -> None:
    if engine.backend.name == "reference":
        with pytest.raises(RequestError, match="temperature: the reference decodes greedily"):
            engine.describe(picture, [BOX], temperature=1.0)
        return
    texts = {engine.describe(picture, [BOX], temperature=2.0, max_tokens=8)[0].text for _ in range(4)}
    assert len(texts) > 1
    if not torch.cuda.is_available():
        with pytest.raises(RequestError, match="seed: vLLM's CPU build takes none with a temperature above 0"):
            engine.describe(picture, [BOX], temperature=2.0, seed=1)
    assert engine.describe(picture, [BOX], seed=1, max_tokens=8) == engine.describe(picture, [BOX], max_tokens=8)


def test_a_closed_engine_says_so(mini: Path, picture: np.ndarray) -> None:
    engine = garserve.load(mini, "reference")
    engine.close()
    with pytest.raises(GarserveError, match="closed"):
        engine.describe(picture, [BOX])


def test_regions_that_are_no_list(reference: Engine, picture: np.ndarray) -> None:
    for regions in (None, 5, {"box": [0, 0, 1, 1]}, "box"):
        with pytest.raises(RequestError, match="regions: expected a list"):
            reference.describe(picture, regions)  # type: ignore[arg-type]


def test_load_refuses_nonsense(mini: Path) -> None:
    with pytest.raises(RequestError, match="backend: expected 'vllm' or 'reference', got 'tensorrt'"):
        garserve.load(mini, "tensorrt")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="max_num_tiles: expected 1 to 36, got 40"):
        garserve.load(mini, "reference", max_num_tiles=40)
    with pytest.raises(RequestError, match="batch_size: expected at least 1, got 'abc'"):
        garserve.load(mini, "reference", batch_size="abc")
    with pytest.raises(RequestError, match="box_scale: expected released or geometric, got 'bogus'"):
        garserve.load(mini, "reference", box_scale="bogus")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="dtype: expected float32"):
        garserve.load(mini, "reference", dtype="float8")


def test_box_scale_can_be_chosen(mini: Path, picture: np.ndarray) -> None:
    texts = set()
    for scale in ("released", "geometric"):
        with garserve.load(mini, "reference", box_scale=scale) as engine:  # type: ignore[arg-type]
            texts.add(engine.describe(picture, [BOX], max_tokens=12)[0].text)
    assert len(texts) == 2


def test_unknown_name_in_the_package() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        garserve.nothing  # noqa: B018
