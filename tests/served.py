"""A garserve server as a process of its own on a free port of the loopback, for tests."""

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.conftest import PHOTO

REGIONS = [{"box": [10, 10, 90, 90]}, {"points": [[366, 283]], "radius": 41}]
QUESTION = "Where is <Prompt0> relative to <Prompt1>?"


class Served:
    """A running server; `http` is a client of it."""

    folder: Path  # of file:// images

    def __init__(self, folder: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = folder / f"log-{self.port}"
        command = [sys.executable, "-m", "garserve", "serve", "tiny", "--port", str(self.port), *options]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **(environment or {})}
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd="/")
        self.url = f"http://127.0.0.1:{self.port}"
        # The server closes a connection that nobody used for 5 seconds: none is taken that may be closed meanwhile.
        self.http = httpx.Client(base_url=self.url, timeout=60, limits=httpx.Limits(keepalive_expiry=2))

    def wait_until_ready(self, seconds: float = 400) -> "Served":
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with contextlib.suppress(httpx.TransportError):
                if self.http.get("/ready").status_code == 200:
                    return self
            time.sleep(0.2)
        raise AssertionError("the server did not become ready:\n" + self.log.read_text()[-3000:])

    def lines(self) -> list[dict[str, Any]]:
        """The JSON lines of its log."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                if isinstance(data := json.loads(line), dict):
                    found.append(data)
        return found

    def engine_pid(self) -> int:
        """The process of its engine: the child of the most memory."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return max(map(int, children), key=_resident)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=120)
        finally:
            self.process.kill()
            self.http.close()


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


@contextlib.contextmanager
def served(folder: Path, *options: str, environment: dict[str, str] | None = None) -> Iterator[Served]:
    server = Served(folder, *options, environment=environment)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


def data_url(image: Any = PHOTO, kind: str = "image/jpeg") -> str:
    """A data URL of a file, of bytes, or of an array as PNG."""
    if isinstance(image, np.ndarray):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        image, kind = file.getvalue(), "image/png"
    if isinstance(image, Path):
        image = image.read_bytes()
    return f"data:{kind};base64," + base64.b64encode(image).decode()


def chat_body(text: str | None = QUESTION, regions: Any = REGIONS, image: str | None = None, **fields: Any) -> dict:
    part: dict[str, Any] = {"type": "image_url", "image_url": {"url": image or data_url()}}
    if regions is not None:
        part["regions"] = regions
    content = [part] if text is None else [part, {"type": "text", "text": text}]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 64, **fields}


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream's events; the last one is "[DONE]"."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
