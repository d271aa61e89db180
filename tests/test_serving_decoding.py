"""What comes out of the engine, and how its end is told: texts in pieces, answers cut off, a dead engine."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from garserve.checkpoint import resolve
from garserve.config import read_config
from garserve.inputs.processor import Processor
from garserve.inputs.prompts import stop_token_id

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")

from starlette.requests import Request
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError
from vllm.v1.engine.exceptions import EngineDeadError

from garserve.inputs.text_stream import TextStream
from garserve.serving import answering
from garserve.serving.answering import as_api_error, stream_response
from garserve.serving.chat import PreparedChat, region_chat
from garserve.serving.decoding import RegionEngineClient
from garserve.serving.errors import APIError

RAW = Request({"type": "http", "method": "POST", "path": "/", "headers": []})


@pytest.fixture(scope="module")
def processor() -> Processor:
    folder = resolve("tiny")
    return Processor(folder, read_config(folder))


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids: Iterable[int]) -> str:
        found = list(ids)
        self.decoded += len(found)
        return str(self._tokenizer.decode(found))


@pytest.mark.parametrize("kind", ["words", "half characters", "replacement characters", "control tokens", "names"])
def test_a_long_text_is_decoded_a_few_tokens_at_a_time(processor: Processor, kind: str) -> None:
    tokenizer = processor.tokenizer
    stop = stop_token_id(tokenizer)
    euro = tokenizer.encode("\u20ac")
    assert len(euro) > 1, "one token: no half of it"
    words = {
        "words": tokenizer.encode("A small red square, \u20ac 5 \U0001f600. "),
        "half characters": [euro[0], *euro],
        "replacement characters": tokenizer.encode("\ufffd"),
        "control tokens": [tokenizer.special("<|begin_of_text|>")],
        "names": tokenizer.encode("<Prompt0>"),
    }[kind]
    ids = (words * 3000)[:3000]
    counting: Any = Counting(tokenizer)
    stream = TextStream(counting, stop)
    pieces = [stream.push([token], finished=False) for token in ids] + [stream.push([stop], finished=True)]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert counting.decoded < 40 * len(ids)


class Ending:
    """An engine client whose answer ends as it is told: by a finish reason, or an exception."""

    def __init__(self, end: str | Exception) -> None:
        self._end = end

    async def generate(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        yield self._output("A", [1], None)
        if isinstance(self._end, Exception):
            raise self._end
        yield self._output("", [], self._end)

    @staticmethod
    def _output(text: str, ids: list[int], reason: str | None) -> Any:
        completion = SimpleNamespace(
            index=0, text=text, token_ids=ids, finish_reason=reason, logprobs=None, stop_reason=None
        )
        return SimpleNamespace(
            outputs=[completion],
            prompt=None,
            prompt_token_ids=[1],
            encoder_prompt_token_ids=None,
            num_cached_tokens=0,
            num_cache_creation_tokens=0,
        )


ENDS = [
    ("abort", 503, "cut_off"),
    ("error", 500, "internal_error"),
    (EngineDeadError(), 503, "engine_dead"),
    (QueueOverflowError(), 503, "queue_full"),
    (MaxQueuedTokensError(), 503, "queue_full"),
]


@pytest.mark.parametrize("stop", [[], ["x"]], ids=["own texts", "stop texts"])
@pytest.mark.parametrize(("end", "status", "code"), ENDS, ids=["abort", "error", "dead", "queue", "tokens"])
def test_an_answer_that_vllm_ends_by_itself_is_none(
    processor: Processor, end: str | Exception, status: int, code: str, stop: list[str]
) -> None:
    client = RegionEngineClient(Ending(end), processor.tokenizer, 5)

    async def ask() -> None:
        async for output in client.generate(None, SimpleNamespace(stop=stop), "r"):  # type: ignore[arg-type]
            assert output.outputs[0].finish_reason is None

    with pytest.raises(Exception) as ended:  # noqa: PT011  (what it becomes is asserted)
        asyncio.run(ask())
    answer = as_api_error(ended.value, RAW)
    assert (answer.status, answer.code) == (status, code)


@pytest.mark.parametrize("limit", [QueueOverflowError(), MaxQueuedTokensError()], ids=["requests", "tokens"])
def test_what_vllm_s_own_limits_refuse_may_be_tried_again(limit: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering.logger, "error", lambda *_, **__: pytest.fail("it is no fault of the server"))
    answer = as_api_error(limit, RAW)
    assert answer.headers == {"Retry-After": "1"}
    assert "try again" in answer.message


def vllm_chat(processor: Processor, end: str | Exception) -> tuple[OpenAIServingChat, RegionEngineClient]:
    """vLLM's own chat, with as much as it asks for between outputs and events."""
    serving = object.__new__(OpenAIServingChat)
    serving.parser_cls, serving.response_role = None, "assistant"
    serving.enable_force_include_usage = serving.enable_log_outputs = False
    serving.system_fingerprint = None
    serving.online_renderer = SimpleNamespace(render_chat=None)  # type: ignore[assignment]
    engine = RegionEngineClient(Ending(end), processor.tokenizer, 5)
    return region_chat(serving, engine), engine


def streamed(processor: Processor, end: str | Exception) -> list[Any]:
    """The events that a client gets of a chat that ends so."""
    chat, engine = vllm_chat(processor, end)
    request = PreparedChat(messages=[], stream=True)

    async def ask() -> list[str]:
        outputs = engine.generate(None, SimpleNamespace(stop=["x"]), "r")  # type: ignore[arg-type]
        events = chat.chat_completion_stream_generator(request, outputs, "r", "tiny", [], None, None)  # type: ignore[arg-type]
        response = stream_response(RAW, events, None)
        return [str(piece) async for piece in response.body_iterator]

    pieces = asyncio.run(ask())
    assert pieces[-1] == "data: [DONE]\n\n"
    return [json.loads(piece.removeprefix("data: ")) for piece in pieces[:-1]]


@pytest.mark.parametrize(("end", "status", "code"), [*ENDS, (ValueError("secret"), 500, "internal_error")], ids=str)
def test_a_streamed_chat_ends_with_the_error_that_others_get(
    processor: Processor, end: str | Exception, status: int, code: str
) -> None:
    found = streamed(processor, end)
    assert "error" not in found[0]
    errors = [event["error"] for event in found if "error" in event]
    kind = APIError(status, "").body()["error"]["type"]
    assert [(error["type"], error["code"]) for error in errors] == [(kind, code)]
    assert "secret" not in json.dumps(found)


def test_what_breaks_inside_vllm_s_stream_is_told_without_its_words(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> str:
        raise ValueError("secret")

    monkeypatch.setattr(OpenAIServingChat, "get_chat_request_role", broken)
    (only,) = streamed(processor, "stop")
    assert only["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(only)
