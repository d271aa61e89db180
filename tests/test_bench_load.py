"""Load of `garserve bench serve` on a small server that is made up."""

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from garserve.bench import load
from garserve.bench.load import Outcome, bodies, closed_loop, open_loop
from garserve.bench.serve import Limits, _percentiles, serve
from garserve.bench.workload import make_workload
from garserve.errors import GarserveError, RequestError
from garserve.inputs.regions import Region

SIZE = (120, 90)


class _Handler(BaseHTTPRequestHandler):
    """Streams an answer of five pieces, 20 ms apart; refuses what has no regions."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)  # type: ignore[attr-defined]
        image = body["messages"][0]["content"][0]
        if not image.get("regions") or body["model"] != "tiny":
            self.send_response(400)
            text = b'{"error": {"message": "no regions"}}'
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        pieces: list[dict[str, Any]] = [{"choices": [{"delta": {"role": "assistant"}}]}]
        pieces += [{"choices": [{"delta": {"content": f"w{i} "}}]} for i in range(5)]
        pieces += [{"choices": [], "usage": {"completion_tokens": 9}}]
        for piece in pieces:
            time.sleep(0.02)
            self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    made.bodies = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def _url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_bodies_say_what_the_workload_asks() -> None:
    asked = make_workload("five", 1, SIZE, max_tokens=8)
    (body,) = bodies(asked, "tiny", 8)
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert text["text"] == asked.requests[0].question
    drawn = [Region.parse(one).mask(SIZE[1], SIZE[0]) for one in image["regions"]]
    assert all(np.array_equal(ours, mask) for ours, mask in zip(drawn, asked.requests[0].regions, strict=True))
    (single,) = bodies(make_workload("stream", 1, SIZE, max_tokens=8), "tiny", 8)
    assert len(single["messages"][0]["content"]) == 1


def test_closed_loop(server: ThreadingHTTPServer) -> None:
    requests = bodies(make_workload("dense", 1, SIZE, max_tokens=8), "tiny", 8)[:6]
    start = time.perf_counter()
    found = asyncio.run(closed_loop(_url(server), requests, clients=3))
    assert time.perf_counter() - start > 2 * 0.14
    assert sorted(map(json.dumps, server.bodies)) == sorted(map(json.dumps, requests))  # type: ignore[attr-defined]
    assert [one.error for one in found] == [None] * 6
    for outcome in found:
        assert outcome.tokens == 9
        assert 0.04 <= outcome.ttft < outcome.e2e
        assert outcome.tpot == pytest.approx((outcome.e2e - outcome.ttft) / 8)
        assert len(outcome.itl) == 4  # of five pieces
        assert sum(outcome.itl) == pytest.approx(outcome.e2e - outcome.ttft)


def test_open_loop_sends_at_its_times(server: ThreadingHTTPServer) -> None:
    requests = bodies(make_workload("dense", 1, SIZE, max_tokens=8), "tiny", 8)
    found = asyncio.run(open_loop(_url(server), requests, rate=100.0, seed=1))
    gaps = [after.due - one.due for one, after in pairwise(found)]
    assert np.mean(gaps) == pytest.approx(0.01, rel=0.6)
    assert np.std(gaps) > 0.003  # not evenly spaced
    assert all(one.sent >= one.due for one in found)
    # Nothing waits for an answer: all of them take 140 ms, and are sent within 200.
    assert max(one.sent for one in found) - found[0].sent < 1.0


def test_failures_are_counted_and_never_good(server: ThreadingHTTPServer) -> None:
    good = bodies(make_workload("dense", 1, SIZE, max_tokens=8), "tiny", 8)[:3]
    bad = [{**good[0], "model": "another"}]
    (failed,) = asyncio.run(closed_loop(_url(server), bad, 1))
    assert failed.ended > failed.sent >= failed.due > 0
    result = serve(_url(server) + "/v1/", [*good, *bad], "here", Limits(), clients=2)
    figures = {row["figure"]: row for row in result.rows}
    assert figures["failed"]["value"] == 1
    assert figures["good share"]["value"] == 0.75
    assert figures["TTFT"]["p50 ms"] < figures["E2E"]["p50 ms"]
    assert "status 400" in result.notes[0]
    with pytest.raises(GarserveError, match="none of 1 requests was answered: status 400"):
        serve(_url(server), bad, "here", Limits())
    with pytest.raises(GarserveError, match="none of 1 requests was answered: ConnectError"):
        serve("http://127.0.0.1:9", bad, "here", Limits())


def test_time_that_failures_took_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Outcome(due=1.0, ended=2.0, arrivals=[1.5, 2.0], tokens=3)

    async def outcomes(*_: Any) -> list[Outcome]:
        return [answer, Outcome(due=1.0, ended=11.0, error="status 500")]

    monkeypatch.setattr("garserve.bench.serve.closed_loop", outcomes)
    rows = {row["figure"]: row.get("value") for row in serve("http://127.0.0.1:9", [], "here", Limits()).rows}
    assert (rows["requests/s"], rows["goodput, requests/s"], rows["answer tokens/s"]) == (0.1, 0.1, 0.3)


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://127.0.0.1", "http://", "http://[::1", "http://127.0.0.1:99999", "http://h:9/\x00"],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(RequestError, match="URL: expected a server's address as in .*, got " + re.escape(repr(url))):
        serve(url, [{}], "here", Limits())


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> str:
    event = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"
USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 6}}\n\n'
# What vLLM's server sends, by the seconds at which it comes: the role with the first token, a token without text, and
# at last a chunk for the stop token alone.
RECORDED = [
    (0.25, _chunk({"role": "assistant", "content": ""})),
    (0.25, _chunk({"content": "A "})),
    (0.375, _chunk({"content": "cup"})),
    (0.5, _chunk({"content": ""})),
    (0.75, _chunk({"content": "\u2028of\x85 two \N{HOT BEVERAGE}"})),
    (1.25, _chunk({"content": ""}, "stop")),
    (2.0, USAGE),
    (3.0, DONE),
]


class _Recorded(httpx.AsyncByteStream):
    """A stream of which each part comes at its time, by a clock that only it moves."""

    def __init__(self, clock: list[float], parts: Sequence[tuple[float, str]]) -> None:
        self.clock, self.parts = clock, parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for when, text in self.parts:
            self.clock[0] = when
            yield text.encode()


def _asked(monkeypatch: pytest.MonkeyPatch, parts: Sequence[tuple[float, str]]) -> Outcome:
    """What is made of a stream that was asked for at second 0."""
    clock = [0.0]
    monkeypatch.setattr(load, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    async def ask() -> Outcome:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=_Recorded(clock, parts)))
        async with httpx.AsyncClient(transport=transport) as client:
            return await load._ask(client, "http://127.0.0.1:9", {}, 0.0)

    return asyncio.run(ask())


def test_figures_are_those_of_vllm_over_the_same_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs_module = pytest.importorskip("vllm.benchmarks.lib.endpoint_request_func")
    clock = [0.0]

    class Session:
        @asynccontextmanager
        async def post(self, **_: Any) -> AsyncIterator[Any]:
            stream = _Recorded(clock, RECORDED)
            yield SimpleNamespace(status=200, content=SimpleNamespace(iter_any=lambda: aiter(stream)))

    monkeypatch.setattr(theirs_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    asked = theirs_module.RequestFuncInput("x", "http://h/v1/chat/completions", 1, 9, "tiny", chat_messages=[])
    theirs = asyncio.run(theirs_module.async_request_openai_chat_completions(asked, Session()))
    assert theirs.success, theirs.error
    ours = _asked(monkeypatch, RECORDED)
    assert ours.error is None
    assert (ours.ttft, ours.e2e, ours.tokens) == (theirs.ttft, theirs.latency, theirs.output_tokens) == (0.25, 1.25, 6)
    assert ours.tpot == (theirs.latency - theirs.ttft) / (theirs.output_tokens - 1)
    assert ours.itl == theirs.itl[1:] == [0.125, 0.125, 0.25, 0.5]
    assert theirs.itl[0] == 0  # from the role to the first text
    assert ours.ended == 3.0


def test_the_first_token_is_the_first_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may name the role long before; and an answer may be its end alone."""
    early = [(0.0, RECORDED[0][1]), (0.125, ": waiting\n\n"), *RECORDED[1:]]
    assert _asked(monkeypatch, early).ttft == 0.25
    ended = _asked(monkeypatch, [RECORDED[0], (0.5, _chunk({"content": ""}, "stop")), (0.75, DONE)])
    assert (ended.error, ended.arrivals, ended.tokens) == (None, [0.5], 0)


def test_pieces_are_the_least_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _asked(monkeypatch, [part for part in RECORDED if part[1] != USAGE]).tokens == 3


@pytest.mark.parametrize("cut", [2, 3, 5])
def test_a_stream_that_does_not_end_is_a_failure(monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    assert _asked(monkeypatch, RECORDED[:cut]).error == "stream cut off"


@pytest.mark.parametrize("end", [RECORDED[5][1], DONE, DONE.rstrip(), "\r\n".join(DONE.split("\n"))])
def test_a_stream_ends_as_either_says(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    assert _asked(monkeypatch, [*RECORDED[:5], (1.0, end)]).error is None


@pytest.mark.parametrize(
    "payload",
    [
        "{",
        "5",
        "null",
        '"text"',
        "[]",
        '{"choices": 5}',
        '{"choices": [5]}',
        '{"choices": [{"delta": 5}]}',
        '{"usage": 5}',
        '{"usage": {"completion_tokens": "many"}}',
        '{"usage": {"completion_tokens": 1e999}}',
        "[" * 100_000,
    ],
)
def test_a_line_that_cannot_be_read_fails_its_request_only(monkeypatch: pytest.MonkeyPatch, payload: str) -> None:
    outcome = _asked(monkeypatch, [*RECORDED[:3], (0.5, f"data: {payload}\n\n"), *RECORDED[4:]])
    assert outcome.error is not None
    assert "a line that cannot be read" in outcome.error
    assert payload[:50] in outcome.error
    assert outcome.ended == 0.5


def test_an_error_in_a_stream_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [*RECORDED[:3], (0.5, 'data: {"error": {"message": "no room"}}\n\n'), (0.5, DONE)]
    assert "no room" in (_asked(monkeypatch, parts).error or "")
    assert _asked(monkeypatch, [(0.1, 'data: {"error": null}\n\n'), *RECORDED]).error is None


def test_goodput_is_under_the_limits() -> None:
    fast = Outcome(due=0.0, arrivals=[0.1, 0.2], tokens=3)
    assert (fast.ttft, fast.e2e, fast.tpot, fast.itl) == (0.1, 0.2, pytest.approx(0.05), [pytest.approx(0.1)])
    assert Limits(ttft=0.1, tpot=0.06, e2e=0.2).kept(fast)
    assert not Limits(ttft=0.09).kept(fast)
    assert not Limits(tpot=0.04).kept(fast)
    assert not Limits(e2e=0.19).kept(fast)
    assert str(Limits()) == "none"
    assert str(Limits(ttft=0.5)) == "ttft 0.5 s"


def test_gaps_of_all_answers_are_one_distribution() -> None:
    """ITL is over every gap, as vLLM counts it; TPOT has one value for each answer."""
    answered = [
        Outcome(due=0.0, arrivals=[1.0, 1.1, 1.2, 1.3], tokens=4),
        Outcome(due=0.0, arrivals=[1.0, 1.9], tokens=4),
        Outcome(due=0.0, arrivals=[1.0], tokens=1),
    ]
    rows = {row["figure"]: row for row in _percentiles(answered)}
    assert rows["ITL"]["p50 ms"] == pytest.approx(100)
    assert rows["ITL"]["p99 ms"] == pytest.approx(np.percentile([100, 100, 100, 900], 99))
    assert rows["TPOT"]["p50 ms"] == pytest.approx(200)  # of 100 and 300
    assert not {"ITL", "TPOT"} & {row["figure"] for row in _percentiles(answered[2:])}


def test_what_warms_a_server_up_is_sent_first_and_not_counted(server: ThreadingHTTPServer) -> None:
    asked = bodies(make_workload("stream", 3, SIZE, max_tokens=8), "tiny", 8)
    warm = bodies(make_workload("stream", 1, SIZE, max_tokens=8, first=3), "tiny", 8)
    result = serve(_url(server), asked, "some", Limits(), warm=warm, clients=3)
    assert "3 requests" in result.conditions
    sent = server.bodies  # type: ignore[attr-defined]
    assert sent[0] == warm[0]
    assert len(sent) == 4
    assert warm[0] not in asked


def test_a_server_with_keys_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GARSERVE_API_KEY", "a key")
    assert load._client(1).headers["Authorization"] == "Bearer a key"
    monkeypatch.delenv("GARSERVE_API_KEY")
    assert "Authorization" not in load._client(1).headers
