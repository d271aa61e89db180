"""Bodies become models, or one complaint, whatever is in them; and not in the event loop."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")

from garserve.serving import answering
from garserve.serving.errors import APIError, from_input, from_validation
from garserve.serving.files import read_file
from garserve.serving.refine import RefineRequest
from garserve.serving.schemas import ChatRequest, DescribeRequest
from tests.conftest import ROOT

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
    headers = [(b"content-type", b"application/json")]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    with pytest.raises(APIError, match="image: Field required"):
        asyncio.run(answering.read_body(request, DescribeRequest))
    assert where != [threading.get_ident()]
    assert len(where) == 1


def read(*kinds: bytes) -> DescribeRequest:
    """A good body with these content types, none or one."""
    from starlette.requests import Request

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"image": "a"}'}

    headers = [(b"content-type", kind) for kind in kinds]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    return asyncio.run(answering.read_body(request, DescribeRequest))


@pytest.mark.parametrize("kind", [b"application/json", b"Application/JSON; charset=utf-8", b"application/vnd.api+json"])
def test_a_body_says_that_it_is_json(kind: bytes) -> None:
    assert read(kind).image == "a"


@pytest.mark.parametrize(
    ("kinds", "got"),
    [((), "none"), ((b"",), "none"), ((b"; q=1",), "none"), ((b"text/plain",), "'text/plain'")],
)
def test_a_body_that_any_page_could_send_is_refused(kinds: tuple[bytes, ...], got: str) -> None:
    """Browsers send such a body to another site without asking it first: no header, or one of a form."""
    with pytest.raises(APIError, match=f"content-type: expected application/json, got {got}$") as refused:
        read(*kinds)
    assert refused.value.status == 415


def test_the_documents_requests_say_that_they_are_json() -> None:
    found = [
        line
        for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.removeprefix("$ ").startswith("curl ") and " -d" in line
    ]
    assert len(found) > 3
    assert not [line for line in found if "-H 'Content-Type: application/json'" not in line]


@pytest.mark.parametrize("url", ["file://[x", "file://[x/a.jpg", "file://\u2100/a.jpg", "file://host/a", "file:///a?b"])
def test_a_file_that_is_nowhere(url: str, tmp_path: Path) -> None:
    """Half of an IPv6 address, and a letter that becomes a slash, among the hosts."""
    with pytest.raises(APIError, match="image_url: expected file:///path") as refused:
        read_file(url, tmp_path, 100)
    assert refused.value.status == 400
