"""Load of `garserve bench serve` on a small server that is made up."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from garserve.bench import load
from garserve.bench.load import Outcome, bodies, closed_loop, open_loop
from garserve.bench.serve import Limits, _percentiles, serve
from garserve.bench.workload import make_workload
from garserve.errors import GarserveError
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
