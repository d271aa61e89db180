"""POST /v1/chat/completions: OpenAI's chat with regions, on vLLM's own serving class."""

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from copy import copy
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import PrivateAttr
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GenerationError

from garserve.errors import RequestError
from garserve.inputs.processor import PreparedRequest
from garserve.inputs.request import Turn
from garserve.serving import metrics
from garserve.serving.answering import as_api_error, attended, deadline_in, read_body, stream_response
from garserve.serving.decoding import RegionEngineClient
from garserve.serving.errors import APIError
from garserve.serving.openapi import documented
from garserve.serving.preparation import check_count
from garserve.serving.routes import Route
from garserve.serving.schemas import ChatRequest, ImagePart
from garserve.serving.service import Service, note, request_id, service
from garserve.vllm_plugin.items import engine_input

router = APIRouter(route_class=Route)
_PASSED_ON = ("top_p", "seed", "n", "stop", "presence_penalty", "frequency_penalty", "logprobs", "top_logprobs")

_OF_TURNS = re.compile(r"(system|question|turns)(?:\[(\d+)\])?: ")  # what RegionRequest calls parts of a conversation
_VLLM_ERROR = 'data: {"error":'  # how vLLM's chat stream tells of an exception; its chunks begin with their id


class PreparedChat(ChatCompletionRequest):
    """vLLM's request with the engine's input beside it, which garserve has made."""

    _engine_input: Any = PrivateAttr(None)


async def _render_prepared(request: PreparedChat) -> tuple[list[Any], list[Any]]:
    """Take the place of what makes vLLM's input from messages."""
    return [], [request._engine_input]


async def _raising(
    stream: Callable[..., AsyncGenerator[str]], request: Any, outputs: AsyncGenerator[Any], *rest: Any, **options: Any
) -> AsyncGenerator[str]:
    """Yield what vLLM makes of the engine's outputs, and raise what it would put into an event in words of its own."""
    failed: list[Exception] = []
    async with (
        aclosing(_remembering(outputs, failed)) as watched,
        aclosing(stream(request, watched, *rest, **options)) as events,
    ):
        async for event in events:
            if failed:
                raise failed[0]
            if event.startswith(_VLLM_ERROR):
                raise GenerationError("vLLM's chat stream failed")
            yield event


async def _remembering(outputs: AsyncGenerator[Any], failed: list[Exception]) -> AsyncGenerator[Any]:
    try:
        async with aclosing(outputs):
            async for output in outputs:
                yield output
    except Exception as error:
        failed.append(error)
        raise


def region_chat(serving: OpenAIServingChat, engine: RegionEngineClient) -> OpenAIServingChat:
    """Return vLLM's chat serving with garserve's prompts, texts and errors; vLLM's own stays as it is."""
    own: Any = copy(serving)
    own.online_renderer = copy(serving.online_renderer)
    own.online_renderer.render_chat = _render_prepared
    own.engine_client = engine
    own.chat_completion_stream_generator = partial(_raising, own.chat_completion_stream_generator)
    return own  # type: ignore[no-any-return]


@router.post("/v1/chat/completions", **documented(ChatRequest, stream=True, summary="Chat about regions of an image"))
async def chat_completions(raw_request: Request) -> Response:
    """Answer the last message of a conversation about the regions of one image.

    The first message of the user holds the image and its regions, which texts call `<Prompt0>`, `<Prompt1>`, …. Without
    any text, the one region is described, and later texts call it `<Prompt1>`. Tokens are the most probable ones unless
    `temperature` says otherwise.
    """
    own = service(raw_request)
    body = await read_body(raw_request, ChatRequest)
    own.check_model(body.model)
    own.check_seed(body.seed, body.temperature)
    deadline = deadline_in(own.settings.request_seconds)
    answer = await attended(raw_request, _answer(own, body, raw_request), deadline)
    if isinstance(answer, ErrorResponse):
        error = answer.error
        if error.code >= 500:
            raise GenerationError(error.message)
        raise APIError(error.code, error.message, param=error.param)
    if hasattr(answer, "__anext__"):
        return stream_response(raw_request, answer, deadline)
    note(raw_request, prompt_tokens=answer.usage.prompt_tokens, completion_tokens=answer.usage.completion_tokens)
    return JSONResponse(answer.model_dump())


async def _answer(own: Service, body: ChatRequest, raw_request: Request) -> Any:
    try:
        prepared = await _prepare(own, body)
        note(raw_request, regions=len(prepared.boxes), prompt_tokens=len(prepared.token_ids))
        metrics.regions.labels("chat").inc(len(prepared.boxes))
        request = _vllm_request(own, body, prepared, request_id(raw_request))
        return await own.chat.create_chat_completion(request, None)
    except Exception as error:  # every kind becomes an answer
        raise as_api_error(error, raw_request) from None


async def _prepare(own: Service, body: ChatRequest) -> PreparedRequest:
    image, given, fields = _conversation(own, body)
    if given is not None:
        check_count(given, own.prompt_count)
    async with own.preparer.picture(image.image_url.url, alpha=given is None) as picture:
        regions = own.preparer.regions(given, picture, own.prompt_count)
        try:
            prepared = await own.preparer.run(own.preparer.prepare, picture, regions, **fields)
        except RequestError as error:
            raise _of_messages(error, first=int("system" in fields)) from None
    own.check_length(len(prepared.token_ids), "messages")
    return prepared


def _of_messages(error: RequestError, first: int) -> RequestError:
    """Return what is said of a question or its turns as said of the messages, of which `first` has the question."""
    found = _OF_TURNS.match(str(error))
    if found is None:
        return error
    field, turn = found.groups()
    place = {"system": 0, "question": first}.get(field, first + 1 + int(turn or 0))
    where = "messages" if found[0] == "turns: " else f"messages[{place}]"
    return RequestError(f"{where}: {str(error)[found.end() :]}")


def _conversation(own: Service, body: ChatRequest) -> tuple[ImagePart, list[Any] | None, dict[str, Any]]:
    """Return the picture, its regions and the texts. Raises RequestError naming the message that is out of place."""
    messages = list(body.messages)
    if sum(len(message.text()) for message in messages) > own.settings.max_text:
        raise RequestError(f"messages: expected at most {own.settings.max_text} characters of text in all")
    fields: dict[str, Any] = {}
    if messages[0].role in ("system", "developer"):
        first = messages.pop(0)
        if first.images():
            raise RequestError("messages[0]: expected text only, got an image in the system's turn")
        fields["system"] = first.text()
    images = [part for message in messages for part in message.images()]
    if not messages or messages[0].role != "user" or len(messages[0].images()) != 1 or len(images) != 1:
        raise RequestError(
            f"messages: expected one image, in the first message of the user, and no other; got {len(images)}"
        )
    turns = []
    for message in messages[1:]:
        if message.role not in ("user", "assistant"):
            raise RequestError(f"messages: expected user and assistant in turn, got {message.role} after the first")
        turns.append(Turn(message.role, message.text()))  # type: ignore[arg-type]
    if images[0].regions is not None and body.regions is not None:
        raise RequestError("regions: given twice, beside the image and beside the messages")
    given = images[0].regions if images[0].regions is not None else body.regions
    fields |= {"question": messages[0].text().strip() or None, "turns": tuple(turns)}
    return images[0], given, fields


def _vllm_request(own: Service, body: ChatRequest, prepared: PreparedRequest, name: str) -> PreparedChat:
    fields = {key: value for key in _PASSED_ON if (value := getattr(body, key)) is not None}
    if body.stream_options is not None and body.stream:
        fields["stream_options"] = body.stream_options.model_dump()
    request = PreparedChat(
        messages=[{"role": "user", "content": ""}],
        model=body.model or own.model_names[0],
        max_completion_tokens=body.max_completion_tokens or body.max_tokens or 256,
        temperature=body.temperature or 0.0,
        stream=bool(body.stream),
        return_token_ids=body.return_token_ids,
        stop_token_ids=[own.stop_id],
        ignore_eos=True,
        skip_special_tokens=False,
        request_id=name,
        **fields,
    )
    request._engine_input = engine_input(prepared)
    return request
