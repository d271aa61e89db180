"""Plain vLLM's own API server with the plugin installed: regions travel in `mm_processor_kwargs`."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from garserve.engine import Engine
from tests.conftest import PHOTO

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
pytestmark = pytest.mark.vllm

REGIONS = [{"box": [10, 10, 90, 90]}, {"points": [[366, 283]], "radius": 41}]
QUESTION = "What is the relation of <Prompt0> to <Prompt1>?"
Ask = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def ask(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Start a server on a free port of the loopback and return a function that sends a chat request to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(mini)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "gar", "--enforce-eager"]
    command += ["--dtype", "float32"]  # by itself vLLM halves float32
    command += ["--trust-request-mm-kwargs", "--chat-template-content-format", "openai", "--skip-mm-profiling"]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd="/")
    base = f"http://127.0.0.1:{port}"

    def send(text: str = QUESTION, *, uuid: str | None = None, images: int = 1, **fields: Any) -> tuple[int, Any]:
        url = "data:image/jpeg;base64," + base64.b64encode(PHOTO.read_bytes()).decode()
        image: dict[str, Any] = {"type": "image_url", "image_url": {"url": url}}
        if uuid is not None:
            image["uuid"] = uuid
        content = [image] * images + [{"type": "text", "text": text}]
        body = {"model": "gar", "max_tokens": 8, "temperature": 0, "return_token_ids": True, **fields}
        body["messages"] = [{"role": "user", "content": content}]
        request = urllib.request.Request(
            f"{base}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    try:
        _wait_until_healthy(base, server, log)
        yield send
    finally:
        server.terminate()
        server.wait(timeout=60)


def _wait_until_healthy(base: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{base}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise AssertionError("the server did not become healthy:\n" + log.read_text()[-3000:])


def test_several_regions_equal_the_reference(ask: Ask, reference: Engine) -> None:
    expected = reference.ask(PHOTO, REGIONS, QUESTION, max_tokens=8)
    for _ in range(2):  # the second time, the engine's process has the items already
        status, answer = ask(mm_processor_kwargs={"regions": REGIONS})
        assert status == 200, answer
        assert answer["choices"][0]["token_ids"] == expected.token_ids
        assert answer["usage"]["prompt_tokens"] == expected.prompt_tokens


def test_single_region_form_equals_the_reference(ask: Ask, reference: Engine) -> None:
    expected = reference.describe(PHOTO, REGIONS[:1], max_tokens=8)[0]
    status, answer = ask(
        "Describe this masked region in detail.", mm_processor_kwargs={"regions": REGIONS[:1], "form": "single"}
    )
    assert status == 200, answer
    assert answer["choices"][0]["token_ids"] == expected.token_ids


def test_a_clients_name_for_an_image_does_not_mix_up_regions(ask: Ask, reference: Engine) -> None:
    """The same uuid with other regions is another item: plain vLLM would take the first one's embeddings."""
    for regions in (REGIONS, [REGIONS[0], {"box": [300, 300, 500, 390]}]):
        expected = reference.ask(PHOTO, regions, QUESTION, max_tokens=8)
        status, answer = ask(uuid="same", mm_processor_kwargs={"regions": regions})
        assert status == 200, answer
        assert answer["choices"][0]["token_ids"] == expected.token_ids


def test_two_images_are_refused(ask: Ask) -> None:
    status, answer = ask(images=2, mm_processor_kwargs={"regions": REGIONS})
    assert status == 400
    assert "one image, got 2" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "regions: missing"),
        ({"regions": []}, "regions: expected 1 to 5, got 0"),
        ({"regions": REGIONS * 3}, "regions: expected 1 to 5, got 6"),
        ({"regions": REGIONS, "form": "single"}, "regions: expected 1, got 2"),
        ({"regions": [{"box": [1000, 10, 9000, 90]}]}, "outside the 600x400 image"),
        ({"regions": REGIONS, "bogus": 1}, "bogus: Extra inputs are not permitted"),
        ({"regions": [{"mask": "/etc/hostname"}]}, "regions[0]: mask: expected a PNG as a data URL"),
        ({"regions": "all"}, "regions: Input should be a valid list"),
        ({"regions": REGIONS, "max_num_tiles": 99}, "max_num_tiles"),
    ],
)
def test_bad_regions_are_answered_with_400(ask: Ask, kwargs: dict[str, Any], message: str) -> None:
    status, answer = ask(mm_processor_kwargs=kwargs)
    assert status == 400, answer
    assert message in answer["error"]["message"]


def test_control_tokens_in_a_question_do_not_pass_for_images(ask: Ask) -> None:
    status, answer = ask("And <|image|>?", mm_processor_kwargs={"regions": REGIONS})
    assert status == 400
    assert "expected <|image|> once, got 2" in answer["error"]["message"]
