"""Load on a server of the tiny checkpoint: mixed requests, clients that leave early, malformed bodies.

`python benchmarks/load.py` starts `garserve serve tiny`. Every whole answer is held against what the engine says
when it is called directly, and no figures are printed where one differs, is lost or gets another status. The overhead
is the server's time for the well-formed requests over the engine's own, called directly by as many at a time: the
median of rounds, in which both take turns. The load repeats requests that were asked before, so tile and prefix caches
are warm.
"""

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Any

from machine import save  # isort: skip  (first: it prefers Intel's OpenMP, before torch comes)
import aiohttp
import numpy as np
import typer
from load_requests import Ask, make_asks
from load_server import idle, memory, server
from rich.console import Console
from rich.table import Table

import garserve
from garserve.bench.runtime import runtime

EARLY, MALFORMED = 0.10, 0.05
DISTINCT = 60  # requests that differ; the others repeat them
MAX_TOKENS = 48
BROKEN = (
    b"{",
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "no image"}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}',
)


@dataclass
class Tally:
    """What came back."""

    first: list[float] = field(default_factory=list)  # seconds to the first token of streams
    whole: list[float] = field(default_factory=list)  # seconds to the end
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def main(
    requests: Annotated[int, typer.Option(min=8, help="Requests of the mixed load.")] = 2000,
    clients: Annotated[int, typer.Option(min=1, help="Clients at a time.")] = 64,
    overhead: Annotated[int, typer.Option(min=1, help="Requests that server and engine are compared on.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of the comparison, of both in turns.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of crops, regions, questions, and the order of the load.")] = 0,
    save_results: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/.../load.json.")] = False,
) -> None:
    """Run the load and print how long answers take."""
    rng = random.Random(seed)
    asks = make_asks(rng, DISTINCT, MAX_TOKENS)
    with server() as (url, pid):
        texts, ratios, tower = _overhead(url, asks, overhead, clients, rounds)
        tally, samples = asyncio.run(_mixed(url, asks, texts, requests, clients, rng, pid))
    if tally.wrong or sum(tally.outcomes.values()) != requests:
        raise SystemExit(f"{len(tally.wrong)} wrong of {requests} ({tally.wrong[:3]}), {tally.outcomes}: no figures")
    figures = {"tower": tower} | _figures(tally, samples, ratios, requests, clients)
    _show(figures)
    if save_results:
        print(save("load", figures, _conditions(clients, rounds)))


def _conditions(clients: int, rounds: int) -> str:
    return (
        "tiny, coffee.jpg in crops of 300 to 600 pixels, engine, server and clients on the same cores; "
        f"{DISTINCT} different requests, each asked before: tile and prefix caches are warm; {clients} clients, at "
        f"most {MAX_TOKENS} tokens an answer, half of the requests streamed; the load is one run, server over engine "
        f"the median of {rounds} rounds, in each the engine and then the server, both of which stay loaded"
    )


def _overhead(url: str, asks: list[Ask], count: int, clients: int, rounds: int) -> tuple[list[str], list[float], str]:
    """Return the engine's texts, the server's time over the engine's of each round, and where its tower ran.

    A round has `count` requests, `clients` at a time. Both have answered every one of them before the first.
    """
    work = [n % len(asks) for n in range(count)]
    with garserve.load("tiny", separate_process=True) as engine:
        texts = [answer.text for answer in engine.describe_many([ask.request for ask in asks])]
        asyncio.run(_served(url, asks, texts, list(range(len(asks))), clients))
        ratios = []
        for _ in range(rounds):
            start = time.perf_counter()
            for _answer in engine.describe_many([asks[n].request for n in work], in_flight=clients):
                pass
            direct = time.perf_counter() - start
            ratios.append(asyncio.run(_served(url, asks, texts, work, clients)) / direct)
        return texts, ratios, runtime(engine).tower


async def _served(url: str, asks: list[Ask], texts: list[str], work: list[int], clients: int) -> float:
    """Return the server's seconds for some of the requests. Raises SystemExit where its texts are not the engine's."""
    tally = Tally()
    async with _session(clients) as session:
        start = time.perf_counter()
        await _run(clients, [lambda n=n: _one(session, url, asks[n], texts[n], tally) for n in work])
        spent = time.perf_counter() - start
    if tally.wrong:
        raise SystemExit(f"{len(tally.wrong)} texts differ from the engine's ({tally.wrong[0]}): no figures")
    return spent


async def _mixed(
    url: str, asks: list[Ask], texts: list[str], requests: int, clients: int, rng: random.Random, pid: int
) -> tuple[Tally, list[dict[str, float]]]:
    """Return what came back from the mixed load, and the memory of the server's processes in its course."""
    tally, samples = Tally(), []
    kinds = ["early"] * int(requests * EARLY) + ["malformed"] * int(requests * MALFORMED)
    kinds += ["whole"] * (requests - len(kinds))
    rng.shuffle(kinds)
    async with _session(clients) as session:
        jobs = []
        for number, kind in enumerate(kinds):
            n = rng.randrange(len(asks))
            if kind == "malformed":
                jobs.append(lambda n=n: _malformed(session, url, BROKEN[n % len(BROKEN)], tally))
            elif kind == "early":
                jobs.append(lambda n=n: _early(session, url, asks[n], tally))
            else:
                jobs.append(lambda n=n: _one(session, url, asks[n], texts[n], tally))
            if number % (requests // 8) == 0:
                jobs[-1] = lambda job=jobs[-1]: _noting(job, pid, samples)
        await _run(clients, jobs)
        samples.append(memory(pid))
        await idle(session, url)
    return tally, samples


async def _noting(job: Any, pid: int, samples: list[dict[str, float]]) -> None:
    samples.append(memory(pid))
    await job()


def _session(clients: int) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=clients)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300))


async def _run(clients: int, jobs: list[Any]) -> None:
    waiting = iter(jobs)

    async def client() -> None:
        for job in waiting:
            await job()

    await asyncio.gather(*(client() for _ in range(clients)))


def _post(session: aiohttp.ClientSession, url: str, body: bytes) -> Any:
    return session.post(f"{url}/v1/chat/completions", data=body, headers={"Content-Type": "application/json"})


async def _one(session: aiohttp.ClientSession, url: str, ask: Ask, expected: str, tally: Tally) -> None:
    start = time.perf_counter()
    async with _post(session, url, ask.body) as response:
        if response.status != 200:
            tally.wrong.append(f"{response.status}: {(await response.text())[:80]}")
        elif response.content_type == "application/json":
            text = json.loads(await response.read())["choices"][0]["message"]["content"]
            _compare_text(text, expected, tally)
        else:
            _compare_text(await _streamed(response, start, tally), expected, tally)
    tally.whole.append(time.perf_counter() - start)
    tally.outcomes["whole"] += 1


async def _streamed(response: aiohttp.ClientResponse, start: float, tally: Tally) -> str:
    text, ended, begun = "", False, False
    async for line in response.content:
        if line.startswith(b"data: {"):
            piece = json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            if piece and not begun:
                begun = True
                tally.first.append(time.perf_counter() - start)
            text += piece
        ended = ended or line.startswith(b"data: [DONE]")
    return text if ended else "(cut off)"


def _compare_text(text: str, expected: str, tally: Tally) -> None:
    if text != expected:
        tally.wrong.append(f"{text!r} for {expected!r}")


async def _early(session: aiohttp.ClientSession, url: str, ask: Ask, tally: Tally) -> None:
    """Go away after the first bytes of a stream, or a moment after the request where the answer is whole."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.2), _post(session, url, ask.body) as response:
            if response.status != 200:
                tally.wrong.append(f"early: {response.status}")
            await response.content.readany()
            response.close()
    tally.outcomes["early"] += 1


async def _malformed(session: aiohttp.ClientSession, url: str, body: bytes, tally: Tally) -> None:
    async with _post(session, url, body) as response:
        if response.status != 400 or "error" not in json.loads(await response.read()):
            tally.wrong.append(f"malformed: {response.status}")
    tally.outcomes["malformed"] += 1


def _percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 3) for p in (50, 90, 99) if values}


def _figures(
    tally: Tally, samples: list[dict[str, float]], ratios: list[float], requests: int, clients: int
) -> dict[str, Any]:
    return {
        "requests": requests,
        "clients": clients,
        "outcomes": dict(tally.outcomes),
        "seconds to the first token": _percentiles(tally.first),
        "seconds to the end": _percentiles(tally.whole),
        "server over engine": round(median(ratios), 3),
        "server over engine, rounds": [round(ratio, 3) for ratio in ratios],
        "memory of the API process, MB": [sample["api"] for sample in samples],
        "memory of the engine, MB": [sample["engine"] for sample in samples],
    }


def _show(figures: dict[str, Any]) -> None:
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, json.dumps(value))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
