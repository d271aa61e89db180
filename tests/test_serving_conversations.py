"""Conversations over HTTP: what is wrong with one is said of a message, which is what its client has sent."""

import asyncio
from typing import Any

import pytest

from garserve.checkpoint import resolve
from garserve.config import read_config
from garserve.errors import RequestError
from garserve.inputs.processor import PreparedRequest, Processor
from garserve.inputs.request import RegionRequest, Turn
from tests.conftest import PHOTO
from tests.served import data_url

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")

from garserve.serving import chat
from garserve.serving.errors import from_input
from garserve.serving.preparation import Preparer
from garserve.serving.schemas import ChatRequest
from garserve.serving.service import Service
from garserve.serving.settings import Settings

BOX = {"box": [10, 10, 90, 90]}


@pytest.fixture(scope="module")
def processor() -> Processor:
    folder = resolve("tiny")
    return Processor(folder, read_config(folder))


def prepared(
    processor: Processor, texts: list[str | None], system: str | None = None, count: int = 1
) -> PreparedRequest:
    """What the engine would get of turns of user and assistant; the first one has the picture and its regions."""
    content: list[Any] = [{"type": "image_url", "image_url": {"url": data_url()}, "regions": [BOX] * count}]
    if texts[0] is not None:
        content.append({"type": "text", "text": texts[0]})
    messages: list[Any] = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": content})
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts) if i]
    made: dict[str, Any] = {"admission": None, "chat": None, "engine": None, "stop_id": 1, "model_names": ["tiny"]}

    async def prepare() -> PreparedRequest:
        settings = Settings()
        own = Service(settings=settings, preparer=Preparer(processor, settings), max_model_len=100_000, **made)
        try:
            return await chat._prepare(own, ChatRequest(messages=messages))
        finally:
            own.preparer.close()

    return asyncio.run(prepare())


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize(
    ("texts", "place", "message"),
    [
        ([None, "A cup.", "Is <Prompt0> red?"], 2, "names <Prompt0>, but the region that was described is <Prompt1>"),
        (["What is <Prompt4>?"], 0, "names <Prompt4>, but the regions given are <Prompt0>"),
        (["What is <Prompt0>?", "A cup.", "And <Prompt1>?"], 2, "names <Prompt1>, but the regions given are <Prompt0>"),
        (["What?", "A cup.", " "], 2, "expected a text, got ' '"),
        (["What?", "A cup."], None, "the last one must be the user's"),
    ],
)
def test_a_message_is_named(
    processor: Processor, texts: list[str | None], place: int | None, message: str, system: str | None
) -> None:
    where = "messages" if place is None else f"messages[{place + (system is not None)}]"
    with pytest.raises(RequestError) as refused:
        prepared(processor, texts, system)
    answer = from_input(refused.value)
    assert (answer.message, answer.param) == (f"{where}: {message}", where)


def test_a_question_that_is_missing_is_missing_in_its_message(processor: Processor) -> None:
    with pytest.raises(RequestError, match=r"^messages\[0\]: 2 regions need one, a question such as 'How"):
        prepared(processor, [None], count=2)


def test_what_is_no_text_s_fault_stays_as_it_is() -> None:
    for said in ("regions: expected 1 to 5, got 6", "regions[0]: box: expected 4 numbers", "turnstiles: none"):
        assert str(chat._of_messages(RequestError(said), 1)) == said
    assert str(chat._of_messages(RequestError("system: half a character"), 1)) == "messages[0]: half a character"


def test_a_conversation_after_a_description_goes_on_with_its_prompt(processor: Processor) -> None:
    """The first turn stays what the plain description asks, token by token."""
    turns = (Turn("assistant", "A cup."), Turn("user", "Is <Prompt1> red?"))
    found = prepared(processor, [None, "A cup.", "Is <Prompt1> red?"]).token_ids
    plain = processor(RegionRequest(PHOTO, [BOX])).token_ids
    assert found == processor(RegionRequest(PHOTO, [BOX], turns=turns)).token_ids
    assert found[: len(plain)] == plain
