"""Bodies become models, or one complaint, whatever is in them; and not in the event loop."""

import asyncio
import json
import threading
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")

from garserve.serving import answering
from garserve.serving.errors import APIError, from_input, from_validation
from garserve.serving.refine import RefineRequest
from garserve.serving.schemas import ChatRequest, DescribeRequest

MANY = 20_000
FIELDS = {f"f{n}": 1 for n in range(MANY)}
REGION = {"image": "a", "region": {"box": [0, 0, 9, 9]}}


def chat(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


@pytest.fixture
def complaints(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many complaints pydantic kept of each body."""
    found: list[int] = []

    def counted(error: ValidationError) -> APIError:
        found.append(error.error_count())
        return from_validation(error)

    monkeypatch.setattr(answering, "from_validation", counted)
    return found


@pytest.mark.parametrize(
    ("model", "body", "message"),
    [
        (DescribeRequest, {"image": "a", "regions": [1] * MANY}, "regions.0: expected an object, got 1"),
        (DescribeRequest, {"image": "a", "regions": [{}] * 100_001}, "regions: List should have at most 100000"),
        (DescribeRequest, {"image": "a", **FIELDS}, f"body: expected at most 64 fields, got an object of {MANY + 1}"),
        (DescribeRequest, {"image": "a", "regions": [FIELDS]}, "regions.0: expected at most 64 fields"),
        (RefineRequest, {**REGION, **FIELDS}, "body: expected at most 64 fields"),
        (ChatRequest, chat("a", regions=[1] * MANY), "regions.0: expected an object, got 1"),
        (ChatRequest, chat("a", metadata=FIELDS), "metadata: expected at most 64 fields"),
        (ChatRequest, chat("a", stop=[1] * MANY), "stop: List should have at most 4 items"),
        (ChatRequest, chat([1] * MANY), "messages.0.content.0: expected an object, got 1"),
        (ChatRequest, chat([{"type": "text", "text": ""}] * MANY), "messages.0.content: List should have at most 256"),
        (ChatRequest, chat([{"type": "text", "text": "", **FIELDS}]), "messages.0.content.0.text: expected at most 64"),
        (ChatRequest, {"messages": [1] * MANY}, "messages.0: expected an object, got 1"),
        (ChatRequest, {"messages": [FIELDS] * 9}, "messages.0: expected at most 64 fields"),
    ],
)
def test_a_body_of_many_faults_is_one_complaint(
    complaints: list[int], model: type[BaseModel], body: dict[str, Any], message: str
) -> None:
    with pytest.raises(APIError) as refused:
        answering.parsed(json.dumps(body).encode(), model)
    assert refused.value.status == 400
    assert refused.value.message.startswith(message)
    assert complaints[0] < 10


def test_a_made_up_field_is_not_repeated_at_length() -> None:
    from garserve.errors import RegionError

    with pytest.raises(APIError, match="Extra inputs are not permitted") as refused:
        answering.parsed(json.dumps({"image": "a", "x" * 100_000: 1}).encode(), DescribeRequest)
    assert len(json.dumps(refused.value.body())) < 500
    assert len(from_input(RegionError("x" * 100_000)).message) <= 1000


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"image": "\\ud800"}', b'{"image": ' + b"9" * 5000 + b"}"])
def test_what_is_not_json(body: bytes) -> None:
    with pytest.raises(APIError, match="body: ") as refused:
        answering.parsed(body, DescribeRequest)
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")


def test_a_body_is_refused_outside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.requests import Request

    where: list[int] = []

    def noted(error: ValidationError) -> APIError:
        where.append(threading.get_ident())
        return from_validation(error)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}"}

    monkeypatch.setattr(answering, "from_validation", noted)
    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    with pytest.raises(APIError, match="image: Field required"):
        asyncio.run(answering.read_body(request, DescribeRequest))
    assert where != [threading.get_ident()]
    assert len(where) == 1
