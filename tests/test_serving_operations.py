"""Running it: keys, limits, cancelling, metrics, logs, replicas, API processes, draining, and losing the engine."""

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from garserve.engine import Engine
from tests.conftest import PHOTO
from tests.served import QUESTION, REGIONS, Served, chat_body, data_url, events, served

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
pytestmark = pytest.mark.vllm

KEY = {"Authorization": "Bearer second-key"}
CHAT, DESCRIBE = "/v1/chat/completions", "/v1/regions/describe"
IMAGE = data_url()
REQUEST_SECONDS = 10  # of the `small` fixture: time enough to fill its queue on a slow machine


def many(count: int = 250, **fields: Any) -> dict[str, Any]:
    """A request that keeps the engine busy on any machine: boxes that are all different, and words at random for each.

    At the highest temperature an answer hardly ever ends before its 300 tokens.
    """
    boxes = [{"box": [n, n % 300, n + 40, n % 300 + 40]} for n in range(count)]
    return {"image": IMAGE, "regions": boxes, "max_tokens": 300, "temperature": 2.0, **fields}


def values(server: Served, *names: str) -> list[float]:
    """The sums of some metrics' samples, all of one moment."""
    text = server.http.get("/metrics", headers=KEY).text
    sums = []
    for name in names:
        found = re.findall(rf"^{name}(?:{{.*}})? ([0-9.e+-]+)$", text, re.M)
        assert found, f"no {name} in\n{text[:2000]}"
        sums.append(sum(map(float, found)))
    return sums


def value(server: Served, name: str) -> float:
    return values(server, name)[0]


def engine_idle(server: Served) -> bool:
    return values(server, "vllm:num_requests_running", "vllm:num_requests_waiting") == [0, 0]


def until(true: Callable[[], bool], seconds: float) -> float:
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds, "not within the bound"
        time.sleep(0.02)
    return time.monotonic() - start


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with small limits that needs a key; the last test kills its engine."""
    folder = tmp_path_factory.mktemp("small")
    keys = folder / "keys"
    keys.write_text("first-key\nsecond-key\n")
    options = ["--api-key-file", str(keys), "--max-queue", "3", "--request-seconds", str(REQUEST_SECONDS)]
    with served(folder, *options, environment={"GARSERVE_API_KEY": "third-key"}) as running:
        yield running


def test_keys(small: Served) -> None:
    for given in (None, "Bearer no", "second-key", "Basic second-key"):
        headers = {} if given is None else {"Authorization": given}
        for method, path in (("POST", CHAT), ("POST", DESCRIBE), ("GET", "/v1/models"), ("GET", "/metrics")):
            answer = small.http.request(method, path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    for key in ("first-key", "second-key", "third-key"):
        assert small.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    for path in ("/", "/page/index.html", "/health", "/ready", "/openapi.json"):
        assert small.http.get(path).status_code == 200
    assert small.http.get("/openapi.json").json()["security"] == [{"key": []}]


def test_request_ids_in_answers_and_in_the_log(small: Served) -> None:
    answer = small.http.post(CHAT, json=chat_body(max_tokens=3), headers={**KEY, "X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    until(lambda: any(line.get("request_id") == "mine-1" for line in small.lines()), 20)
    line = next(line for line in small.lines() if line.get("request_id") == "mine-1")
    expected = {"event": "request", "status": 200, "path": CHAT, "method": "POST", "regions": 2, "completion_tokens": 3}
    assert expected.items() <= line.items()
    assert line["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert line["ms"] > 0
    strange = small.http.get("/v1/models", headers={**KEY, "X-Request-Id": "a b/c"})
    assert re.fullmatch("[0-9a-f]{32}", strange.headers["x-request-id"])
    assert any(line["event"] == "ready" for line in small.lines())
    assert "second-key" not in small.log.read_text()


def test_metrics(small: Served) -> None:
    before = value(small, "garserve:regions_total")
    small.http.post(CHAT, json=chat_body(max_tokens=2), headers=KEY)
    small.http.post(DESCRIBE, json={**many(3), "max_tokens": 2}, headers=KEY)
    assert value(small, "garserve:regions_total") == before + 5
    assert value(small, "garserve:preprocess_seconds_count") > 0
    assert value(small, "vllm:prompt_tokens_total") > 0
    assert value(small, "garserve:queue") == 0
    until(lambda: value(small, "garserve:tiles_reused") > 0, 30)
    names = [f"garserve:tiles_{name}" for name in ("requested", "computed", "reused")]
    requested, computed, reused = values(small, *names)
    assert requested > computed > 0
    assert reused == requested - computed


def open_stream(server: Served, stack: contextlib.ExitStack, **fields: Any) -> Iterator[str]:
    """Start a stream and wait for its first event; the connection lasts as long as what is returned."""
    response = stack.enter_context(server.http.stream("POST", DESCRIBE, json=many(stream=True, **fields), headers=KEY))
    assert response.status_code == 200
    lines = response.iter_lines()
    next(lines)
    return lines


def test_a_full_queue_is_429_and_clients_that_go_away_make_room(small: Served) -> None:
    gone = value(small, "garserve:disconnected_total")
    with contextlib.ExitStack() as stack:
        held = [open_stream(small, stack) for _ in range(3)]  # whose end would close the connection
        refused = small.http.post(CHAT, json=chat_body(), headers=KEY)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert small.http.get("/health").status_code == 200
        assert value(small, "vllm:num_requests_running") > 0
        del held
    until(lambda: value(small, "garserve:requests") == 0, 30)
    until(lambda: engine_idle(small), 30)
    assert value(small, "garserve:disconnected_total") == gone + 3
    assert small.http.post(CHAT, json=chat_body(max_tokens=1), headers=KEY).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "patience"),
    [
        (DESCRIBE, many(), 0.3),
        (CHAT, chat_body(None, [REGIONS[0]], temperature=2.0, n=8), 0.02),  # a prefill and a step take longer
    ],
    ids=["250 regions", "eight answers"],
)
def test_a_client_that_goes_away_before_a_whole_answer_ends_the_work(
    small: Served, path: str, body: dict[str, Any], patience: float
) -> None:
    gone = value(small, "garserve:disconnected_total")
    with pytest.raises(httpx.ReadTimeout):
        small.http.post(path, json=body, headers=KEY, timeout=httpx.Timeout(60, read=patience))
    until(lambda: value(small, "garserve:disconnected_total") == gone + 1, 30)
    until(lambda: value(small, "garserve:requests") == 0, 30)
    until(lambda: engine_idle(small), 30)


def test_an_answer_that_takes_too_long(small: Served) -> None:
    def ask() -> tuple[httpx.Response, float]:
        start = time.monotonic()
        answer = httpx.post(small.url + DESCRIBE, json=many(), headers=KEY, timeout=60)
        return answer, time.monotonic() - start

    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(ask)
        with small.http.stream("POST", DESCRIBE, json=many(stream=True), headers=KEY) as response:
            pieces = events(response)
        answer, spent = whole.result(60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout"), answer.text[:200]
    assert REQUEST_SECONDS <= spent < 40
    assert pieces[-2]["error"]["code"] == "timeout"
    assert pieces[-1] == "[DONE]"
    until(lambda: engine_idle(small), 30)


class Balancer:
    """One address over several servers, a connection to each in turn; a server that is gone is passed over."""

    def __init__(self, ports: list[int]) -> None:
        self._ports, self._turn, self.used = ports, 0, set[int]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        for _ in self._ports:
            self._turn += 1
            port = self._ports[self._turn % len(self._ports)]
            with contextlib.suppress(OSError):
                server = socket.create_connection(("127.0.0.1", port))
                self.used.add(port)
                threading.Thread(target=_copy, args=(server, client), daemon=True).start()
                return _copy(client, server)
        return client.close()

    def close(self) -> None:
        self._listener.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def asked(url: str) -> str:
    answer = httpx.post(f"{url}{CHAT}", json=chat_body(), headers=KEY, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_two_replicas_behind_one_address(server: Served, small: Served, tiny_reference: Engine) -> None:
    expected = tiny_reference.ask(PHOTO, REGIONS, QUESTION, max_tokens=64).text
    with contextlib.closing(Balancer([server.port, small.port])) as balancer:
        assert [asked(balancer.url) for _ in range(6)] == [expected] * 6
        assert balancer.used == {server.port, small.port}


def test_several_api_processes_over_one_engine_drain_in_order(
    tmp_path_factory: pytest.TempPathFactory, tiny_reference: Engine
) -> None:
    """Both processes answer; after SIGTERM, a stream in work comes to its end, new requests do not begin."""
    expected = tiny_reference.ask(PHOTO, REGIONS, QUESTION, max_tokens=64).text
    with served(tmp_path_factory.mktemp("workers"), "--api-workers", "2", "--drain-seconds", "120") as running:
        until(lambda: [line["event"] for line in running.lines()].count("ready") == 2, 120)
        found: list[str] = []

        def both_have_answered() -> bool:
            with ThreadPoolExecutor(8) as pool:
                found.extend(pool.map(asked, [running.url] * 16))
            return len({line["pid"] for line in running.lines() if line["event"] == "request"}) == 2

        until(both_have_answered, 120)
        assert set(found) == {expected}
        assert value(running, "garserve:regions_total") == len(REGIONS) * len(found)
        with contextlib.ExitStack() as stack:
            streams = [open_stream(running, stack, count=30, temperature=1.5) for _ in range(2)]
            running.process.send_signal(signal.SIGTERM)
            until(lambda: _refuses(running), 20)
            for lines in streams:
                pieces = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
                assert sum("text" in piece for piece in pieces) == 30
        assert running.process.wait(150) == 0, running.log.read_text()[-3000:]
        drained = [line for line in running.lines() if line["event"] == "drained"]
        assert [line["finished"] for line in drained] == [True, True]


def _refuses(server: Served) -> bool:
    """Whether a new request is refused, by 503 or because nobody listens any more."""
    try:
        answer = httpx.post(server.url + CHAT, json=chat_body(max_tokens=1), headers=KEY, timeout=10)
    except httpx.TransportError:
        return True
    return answer.status_code == 503 and answer.json()["error"]["code"] == "unavailable"


def test_a_killed_engine_is_told_to_those_who_wait_and_the_server_ends(small: Served) -> None:
    body = chat_body(None, [REGIONS[0]], temperature=2.0, n=8, max_tokens=1000, stream=True)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        lines = open_stream(small, stack)
        chat = stack.enter_context(small.http.stream("POST", CHAT, json=body, headers=KEY)).iter_lines()
        next(chat)
        waiting = pool.submit(lambda: httpx.post(small.url + DESCRIBE, json=many(), headers=KEY, timeout=60))
        until(lambda: value(small, "garserve:requests") == 3, 30)
        killed = time.monotonic()
        os.kill(small.engine_pid(), signal.SIGKILL)
        until(lambda: not _ready(small), 10)
        for stream in (lines, chat):
            pieces = [line[6:] for line in stream if line.startswith("data: ")]
            assert json.loads(pieces[-2])["error"]["code"] == "engine_dead"
            assert pieces[-1] == "[DONE]"
        answer = waiting.result(60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
        assert small.process.wait(60) == 1
        assert time.monotonic() - killed < 60
    assert any(line["event"] == "engine lost" for line in small.lines())


def _ready(server: Served) -> bool:
    try:
        return httpx.get(f"{server.url}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
