"""A server of the tiny checkpoint for the load: started, asked how large and how busy it is, and ended in order."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import aiohttp


@contextlib.contextmanager
def server() -> Iterator[tuple[str, int]]:
    """Start one, and yield its URL and its process id. Raises SystemExit where it does not start, or end in order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "garserve", "serve", "tiny", "--port", str(port)]
    log = Path(tempfile.mkstemp(suffix=".log")[1])
    with log.open("wb") as out:
        process = subprocess.Popen(command, stderr=out)  # noqa: S603  (this Python, and a number)
    url = f"http://127.0.0.1:{port}"
    try:
        asyncio.run(_until_ready(url, process))
        yield url, process.pid
        process.send_signal(signal.SIGTERM)
        if process.wait(90):
            raise SystemExit(f"the server did not end in order ({log}): no figures")
    except (aiohttp.ClientError, SystemExit):
        sys.stderr.write(log.read_text(errors="replace")[-3000:])
        raise
    finally:
        process.kill()


async def _until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    async with aiohttp.ClientSession() as session:
        while process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError):
                if (await session.get(f"{url}/ready")).status == 200:
                    return
            await asyncio.sleep(0.5)
    raise SystemExit("the server did not start")


async def idle(session: aiohttp.ClientSession, url: str) -> None:
    """Wait until the server has nothing in work: clients that went away leave nothing behind."""
    for _ in range(50):
        text = await (await session.get(f"{url}/metrics")).text()
        if "garserve:requests 0.0" in text:
            return
        await asyncio.sleep(0.1)
    raise SystemExit("requests stayed in work: no figures")


def memory(pid: int) -> dict[str, float]:
    """Return MB of the API process and of its largest child, the engine."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {"api": _resident(pid), "engine": max(_resident(int(child)) for child in children)}


def _resident(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
