"""What is hostile is refused with the documented 4xx within a second, and the server answers on as before."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from garserve.engine import Engine
from tests.conftest import PHOTO
from tests.hostile import CHAT, DESCRIBE, cases
from tests.served import QUESTION, REGIONS, Served, chat_body

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
pytestmark = pytest.mark.vllm

SECOND = 1.0
TRIES = 3  # of which the fastest counts: a busy machine may stop anybody for a second
BODY_SECONDS = 3  # of the `server` fixture
INSIDE = ("Traceback", 'File "', "site-packages", "garserve/", "0x7f", "python3")


def refused(response: httpx.Response, status: int, words: str, seconds: float) -> None:
    assert response.status_code == status, response.text[:300]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"], error["message"]
    assert len(response.content) < 2_000
    assert not [word for word in INSIDE if word in response.text], response.text
    assert seconds < SECOND, f"took {seconds:.2f} seconds"


def timed(server: Served, path: str, body: Any) -> tuple[httpx.Response, float]:
    """Return an answer, and the seconds of the fastest try."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    spent: list[float] = []
    while len(spent) < TRIES:
        start = time.perf_counter()
        response = server.http.post(path, content=data, headers={"Content-Type": "application/json"})
        spent.append(time.perf_counter() - start)
        if spent[-1] < SECOND:
            break
    return response, min(spent)


def test_hostile_requests(server: Served, tiny_reference: Engine) -> None:
    found = cases(server.folder)
    assert len(found) >= 40
    wrong = {}
    for name, (path, body, status, words) in found.items():
        try:
            response, seconds = timed(server, path, body)
            refused(response, status, words, seconds)
        except (AssertionError, httpx.HTTPError) as error:
            wrong[name] = str(error)[:300]
    assert not wrong, json.dumps(wrong, indent=1)
    expected = tiny_reference.ask(PHOTO, REGIONS, QUESTION, max_tokens=64).text
    answer = server.http.post(CHAT, json=chat_body()).json()
    assert answer["choices"][0]["message"]["content"] == expected


def talk(server: Served, data: bytes, *, wait: float = 30.0) -> bytes:
    """Send bytes as they are and return what comes back until the server closes, or is silent for `wait` seconds."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as connection:
        with contextlib.suppress(ConnectionError):  # a server that takes no more has answered already
            connection.sendall(data)
        back = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while piece := connection.recv(65536):
                back += piece
                if b"\r\n\r\n" in back and b'"code"' in back:
                    break
        return back


HEAD = b"POST /v1/regions/describe HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (HEAD + b"Content-Length: 500\r\n\r\n{", b"408"),  # slow body: the rest never comes
        (HEAD + b"Content-Length: 99999999999\r\n\r\n{", b"413"),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{", b"400"),
        (HEAD + b"Content-Length: -5\r\n\r\n{", b"400"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 140, b"413"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /v1/chat/completions HTTP/1.1\r\nHost: a\r\n\r\n", b"405"),
        (b"GET /%ff%fe/../../etc/passwd HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"404"),
    ],
    ids=["slow", "long", "two lengths", "negative", "bad chunk", "long chunks", "nonsense", "method", "path"],
)
def test_hostile_bytes(server: Served, data: bytes, status: bytes) -> None:
    limit = SECOND + 0.3 + BODY_SECONDS * (status == b"408")
    spent: list[float] = []
    while len(spent) < TRIES:
        start = time.perf_counter()
        back = talk(server, data)
        spent.append(time.perf_counter() - start)
        assert back.startswith(b"HTTP/1.1 " + status), back[:200]
        assert server.http.get("/health").status_code == 200
        if spent[-1] < limit:
            break
    assert min(spent) < limit


def test_other_content_types_and_origins(server: Served) -> None:
    body = json.dumps(chat_body()).encode()
    form = server.http.post(CHAT, content=body, headers={"Content-Type": "application/x-www-form-urlencoded"})
    bare = server.http.post(CHAT, content=body)
    assert "content-type" not in bare.request.headers
    assert [form.status_code, bare.status_code] == [415, 415]
    asked = server.http.options(CHAT, headers={"Origin": "https://evil", "Access-Control-Request-Method": "POST"})
    assert "access-control-allow-origin" not in asked.headers


def probed(server: Served, body: Any) -> tuple[list[float], float]:
    """Ask for two descriptions at once; returns the seconds of each look at /health meanwhile, and of all together."""
    with ThreadPoolExecutor(2) as pool:
        start = time.perf_counter()
        asked = [pool.submit(httpx.post, server.url + DESCRIBE, json=body, timeout=60) for _ in range(2)]
        probes = []
        while not all(one.done() for one in asked):
            begun = time.perf_counter()
            assert server.http.get("/health").status_code == 200
            probes.append(time.perf_counter() - begun)
            time.sleep(0.01)
        spent = time.perf_counter() - start
    answers = [one.result() for one in asked]
    assert [answer.status_code for answer in answers] == [200] * 2, answers[0].text
    return probes, spent


def test_health_answers_while_large_images_are_decoded(server: Served) -> None:
    """The event loop is free while threads decode: probes come back long before the images are ready."""
    import io

    import numpy as np
    from PIL import Image

    from tests.served import data_url

    file = io.BytesIO()
    noise = np.random.default_rng(3).integers(0, 255, (600, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((5000, 5000)).save(file, "JPEG", quality=30)
    body = {"image": data_url(file.getvalue()), "regions": [{"box": [0, 0, 3000, 3000]}], "max_tokens": 1}
    for _ in range(TRIES):
        probes, spent = probed(server, body)
        middle, slowest = sorted(probes)[len(probes) // 2], max(probes)
        if free := len(probes) > 10 and middle < spent / 10 and slowest < spent / 2:
            break
    assert free, f"{len(probes)} probes, {middle:.3f} s in the middle, {slowest:.3f} s the slowest, of {spent:.2f} s"


class _Redirector(BaseHTTPRequestHandler):
    """A host that is listed, and sends whoever asks elsewhere."""

    targets: dict[str, str] = {}

    def do_GET(self) -> None:
        if self.path in self.targets:
            self.send_response(302)
            self.send_header("Location", self.targets[self.path])
            self.end_headers()
            return
        if self.path == "/slow":
            time.sleep(2)
        self.send_response(404 if self.path == "/no" else 200)
        self.end_headers()
        self.wfile.write(b"x" * 5000 if self.path == "/big" else PHOTO.read_bytes())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def redirector() -> Iterator[int]:
    host = ThreadingHTTPServer(("127.0.0.1", 0), _Redirector)
    port = host.server_port
    _Redirector.targets = {
        "/inside": "http://169.254.169.254/latest",
        "/private": f"http://private.test:{port}/photo",
        "/file": "file:///etc/passwd",
        "/self": "/self",
        "/broken": "http://[",
        "/once": "/photo",
        "/rebound": f"http://rebound.test:{port}/photo",
    }
    threading.Thread(target=host.serve_forever, daemon=True).start()
    yield port
    host.shutdown()


def test_fetching_goes_where_it_may(redirector: int) -> None:
    """Redirects to other hosts, to names that are inside, to files, and names that change: all refused."""
    from garserve.serving.errors import APIError
    from garserve.serving.fetch import Fetcher, is_public

    looked_up: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        looked_up.append(host)
        if host == "rebound.test":  # allowed for whoever asks first, inside afterwards; nobody listens there
            return ["127.0.0.2"] if looked_up.count(host) == 1 else ["10.0.0.1"]
        return {"good.test": ["127.0.0.1"], "private.test": ["10.0.0.1"], "mixed.test": ["127.0.0.1", "10.0.0.1"]}[host]

    hosts = [f"{name}.test:{redirector}" for name in ("good", "private", "mixed", "rebound")]

    def get(path: str, host: str = "good.test", seconds: float = 30) -> Any:
        fetch = Fetcher(
            hosts,
            max_bytes=200_000,
            seconds=seconds,
            resolve=resolve,
            allowed=lambda address: address in ("127.0.0.1", "127.0.0.2") or is_public(address),
        )
        return asyncio.run(fetch(f"http://{host}:{redirector}{path}"))

    assert get("/once") == PHOTO.read_bytes()
    for path, words in {
        "/inside": "not a host",
        "/private": "not a public address",
        "/file": "expected http",
        "/self": "more than 3 redirects",
        "/broken": "redirected to what is not a URL",
        "/no": "status 404",
    }.items():
        with pytest.raises(APIError, match=words):
            get(path)
    with pytest.raises(APIError, match="not there within"):
        get("/slow", seconds=0.3)
    with pytest.raises(APIError, match="not a public address"):
        get("/photo", "mixed.test")
    assert looked_up.count("rebound.test") == 0
    with pytest.raises(APIError, match="cannot be fetched"):  # one look-up: what was checked is used
        get("/rebound")
    assert looked_up.count("rebound.test") == 1
    small = Fetcher(hosts, max_bytes=1000, seconds=30, resolve=resolve, allowed=lambda _: True)
    with pytest.raises(APIError, match="more than 1000 bytes"):
        asyncio.run(small(f"http://good.test:{redirector}/big"))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("fec0::1", False),
    ],
)
def test_addresses(address: str, public: bool) -> None:
    from garserve.serving.fetch import is_public

    assert is_public(address) is public


def test_a_file_that_becomes_a_link_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The opened file is asked where it lies, so that a link which appears after the first look leads nowhere."""
    import os

    from garserve.serving.errors import APIError
    from garserve.serving.files import read_file

    folder, secret = tmp_path / "images", tmp_path / "secret"
    (folder / "sub").mkdir(parents=True)
    secret.mkdir()
    (folder / "sub" / "a.jpg").write_bytes(b"image")
    (secret / "a.jpg").write_bytes(b"secret")
    url = f"file://{folder}/sub/a.jpg"
    assert read_file(url, folder, 100) == b"image"
    opened = os.open

    def swapped(path: str, flags: int, *more: Any) -> int:
        (folder / "sub").rename(folder / "old")
        (folder / "sub").symlink_to(secret)
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(APIError, match="no such file below"):
        read_file(url, folder, 100)
