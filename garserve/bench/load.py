"""Load on a running server: requests at given times or by given clients, and when each token of each came back."""

import asyncio
import base64
import io
import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
from PIL import Image
from pycocotools import mask as coco

from garserve.bench.workload import Workload
from garserve.errors import RequestError
from garserve.inputs.request import RegionRequest

_TIMEOUT = 600.0  # seconds for one answer
_LAST_PORT = 65535
# By what a line that is no event is known.
_ODD = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


@dataclass
class Outcome:
    """One request: when it was due, sent and over (perf_counter), when its chunks came, or what went wrong.

    Chunks are counted as in `vllm bench serve`, also those without text, such as the last one, which may bring only the
    stop token; but from the first text on, where vLLM starts with the chunk that names the role, which has no token.
    """

    due: float
    sent: float = 0.0
    ended: float = 0.0  # with an answer or a failure
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    complete: bool = False  # whether the stream said that it ends
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first text, from when the request was due: a late client hides no waiting."""
        return self.arrivals[0] - self.due

    @property
    def e2e(self) -> float:
        """Seconds to the last chunk of the answer, as vLLM's E2EL, from when the request was due."""
        return self.arrivals[-1] - self.due

    @property
    def itl(self) -> list[float]:
        """Seconds between each chunk and the next; a chunk may hold several tokens, as in vLLM's ITL."""
        return [after - one for one, after in pairwise(self.arrivals)]

    @property
    def tpot(self) -> float:
        """Mean seconds between tokens after the first, as vLLM's TPOT; 0 for an answer of one token."""
        return (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1) if self.tokens > 1 else 0.0


def base_url(url: str) -> str:
    """Return a server's address, without `/v1` at its end. Raises RequestError for what cannot be one."""
    try:
        parsed = httpx.URL(url)
        usable = parsed.scheme in ("http", "https") and bool(parsed.host) and (parsed.port or 0) <= _LAST_PORT
    except (httpx.InvalidURL, ValueError):
        usable = False
    if not usable:
        raise RequestError(f"URL: expected a server's address as in http://127.0.0.1:8000, got {url!r:.80}")
    return url.rstrip("/").removesuffix("/v1")


def bodies(workload: Workload, model: str, max_tokens: int) -> list[dict[str, Any]]:
    """Return each request as the body of a streaming chat completion; an image is encoded once."""
    urls: dict[int, str] = {}
    made = []
    for request in workload.requests:
        if id(request.image) not in urls:
            urls[id(request.image)] = _data_url(request.image)
        image = {"type": "image_url", "image_url": {"url": urls[id(request.image)]}, "regions": _regions(request)}
        content: list[dict[str, Any]] = [image]
        if request.question is not None:
            content.append({"type": "text", "text": request.question})
        body = {"model": model, "messages": [{"role": "user", "content": content}], "stream": True, "temperature": 0}
        made.append(body | {"max_tokens": max_tokens, "stream_options": {"include_usage": True}})
    return made


async def open_loop(url: str, requests: Sequence[dict[str, Any]], rate: float, seed: int) -> list[Outcome]:
    """Send requests at the times of a Poisson process of `rate` a second, whatever is still under way."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(requests))
    start = time.perf_counter() + 0.1
    dues = [start + float(at) for at in np.cumsum(gaps)]

    async def at_its_time(client: httpx.AsyncClient, body: dict[str, Any], due: float) -> Outcome:
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        return await _ask(client, url, body, due)

    async with _client(len(requests)) as client:
        jobs = [at_its_time(client, body, due) for body, due in zip(requests, dues, strict=True)]
        return list(await asyncio.gather(*jobs))


async def closed_loop(url: str, requests: Sequence[dict[str, Any]], clients: int) -> list[Outcome]:
    """Let so many clients send one request after the other until all are answered."""
    waiting = iter(requests)
    found: list[Outcome] = []

    async def one_client(client: httpx.AsyncClient) -> None:
        for body in waiting:
            found.append(await _ask(client, url, body, time.perf_counter()))

    async with _client(clients) as client:
        await asyncio.gather(*(one_client(client) for _ in range(clients)))
    return found


def _client(connections: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    key = os.environ.get("GARSERVE_API_KEY", "").strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(timeout=_TIMEOUT, limits=limits, headers=headers, trust_env=False)


async def _ask(client: httpx.AsyncClient, url: str, body: dict[str, Any], due: float) -> Outcome:
    outcome = Outcome(due, time.perf_counter())
    try:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                outcome.error = f"status {response.status_code}: {text[:200]}"
            else:
                await _read(outcome, response)
    except (httpx.HTTPError, UnicodeError) as error:  # UnicodeError: of a host's name that is none
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.ended = time.perf_counter()
    return outcome


async def _read(outcome: Outcome, response: httpx.Response) -> None:
    """Note a stream's events up to its end, or up to what is wrong with it."""
    async for line in _lines(response):
        if not line.startswith(b"data:"):
            continue
        try:
            _note(outcome, line.removeprefix(b"data:").strip())
        except _ODD as error:
            shown = line[:100].decode(errors="replace")
            outcome.error = f"a line that cannot be read ({type(error).__name__}): {shown}"
        if outcome.error is not None:
            return
    if not outcome.complete:
        outcome.error = "stream cut off"
    elif not outcome.arrivals:
        outcome.error = "an answer without a token"


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield what line feeds end, and nothing else: a text may hold other characters at which Python ends lines."""
    rest = b""
    async for block in response.aiter_bytes():
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line
    yield rest


def _note(outcome: Outcome, payload: bytes) -> None:
    """Note what an event brings: a chunk of the answer, the usage, the end, or an error in the middle of the stream.

    Raises one of `_ODD` for what is no event.
    """
    when = time.perf_counter()
    if payload == b"[DONE]":
        outcome.complete = True
        return
    event = json.loads(payload)
    if (error := event.get("error")) is not None:
        outcome.error = str(error)[:200]
        return
    choices = event.get("choices") or []
    finished = any(choice.get("finish_reason") for choice in choices)
    if any((choice.get("delta") or {}).get("content") for choice in choices):
        outcome.arrivals.append(when)
        outcome.tokens += 1  # at least: the usage says how many
    elif finished or (choices and outcome.arrivals):
        outcome.arrivals.append(when)
    outcome.complete |= finished
    if (usage := event.get("usage")) is not None:
        outcome.tokens = int(usage.get("completion_tokens") or outcome.tokens)


def _data_url(image: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _regions(request: RegionRequest) -> list[dict[str, Any]]:
    encoded = [coco.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in request.regions]
    return [{"rle": {"size": list(one["size"]), "counts": one["counts"].decode()}} for one in encoded]
