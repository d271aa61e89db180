"""Who may ask a server for what: its variables, the keys under a root path, and what its gate counts."""

import asyncio
from argparse import Namespace
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from garserve.errors import RequestError

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")

CHAT, KEY = "/v1/chat/completions", {"Authorization": "Bearer secret"}


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GARSERVE_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def plugged_in(monkeypatch: pytest.MonkeyPatch, *, root_path: str = "", **settings: Any) -> Any:
    """An app as vLLM makes one, with garserve's routes and gate in it, and without an engine."""
    from fastapi import FastAPI

    from garserve.serving import plugin
    from garserve.serving.settings import Settings

    monkeypatch.setattr(plugin, "set_up", lambda form: None)  # the log stays the tests'
    app = FastAPI(root_path=root_path)
    app.state.args = Namespace(garserve=Settings(**settings) if settings else None)
    plugin.RegionEndpoints().attach_router(app)
    return app


def asked(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    """The app's answer to one request."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


def test_what_kubernetes_sets_for_a_service_of_that_name_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    from garserve.serving.settings import Settings

    address, port = "10.0.0.11", "GARSERVE_SERVE_PORT_8000_TCP"
    web = {"GARSERVE_SERVE_WEB_SERVICE_HOST": address, "GARSERVE_SERVE_WEB_PORT": "udp://10.0.0.12:53"}
    named = {"GARSERVE_SERVE_SERVICE_HOST": address, "GARSERVE_SERVE_SERVICE_PORT_HTTP": "8000"}
    addresses = {"GARSERVE_SERVE_PORT": f"tcp://{address}:8000", port: f"tcp://{address}:8000", f"{port}_ADDR": address}
    for name, value in (web | named | addresses).items():
        monkeypatch.setenv(name, value)
    assert Settings.from_environment() == Settings()
    monkeypatch.setenv("GARSERVE_SERVE_PORT", "8000")
    with pytest.raises(RequestError, match=r"^GARSERVE_SERVE_PORT: no variable of the server"):
        Settings.from_environment()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("GARSERVE_SERVE_API_KEY", "did you mean GARSERVE_SERVE_API_KEYS"),
        ("GARSERVE_SERVE_IMAGE_HOST", "did you mean GARSERVE_SERVE_IMAGE_HOSTS"),
        ("GARSERVE_SERVE_max_queue", "did you mean GARSERVE_SERVE_MAX_QUEUE"),
        ("GARSERVE_SERVE_", "the fields of garserve's Settings are all"),
    ],
)
def test_a_variable_that_is_none_of_the_servers(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    from garserve.serving.settings import Settings

    monkeypatch.setenv(name, "secret")
    with pytest.raises(RequestError, match=f"^{name}: no variable of the server; {meant}") as refused:
        Settings.from_environment()
    assert "secret" not in str(refused.value)
    with pytest.raises(RequestError, match=name):
        plugged_in(monkeypatch)


@pytest.mark.parametrize(
    ("listed", "single", "keys"),
    [
        ("", "secret", ("secret",)),
        (" , ", "secret", ("secret",)),
        ("a, b", "secret", ("a", "b", "secret")),
        ("a,secret", "secret", ("a", "secret")),
        ("a", None, ("a",)),
        ("", None, ()),
    ],
)
def test_keys_of_all_variables(
    monkeypatch: pytest.MonkeyPatch, listed: str, single: str | None, keys: tuple[str, ...]
) -> None:
    from garserve.serving.settings import Settings

    monkeypatch.setenv("GARSERVE_SERVE_API_KEYS", listed)
    if single is not None:
        monkeypatch.setenv("GARSERVE_API_KEY", single)
    assert Settings.from_environment().api_keys == keys


def test_an_empty_folder_of_images_is_not_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from garserve.serving.settings import Settings

    for nothing in ("", " "):
        monkeypatch.setenv("GARSERVE_SERVE_IMAGE_FOLDER", nothing)
        assert Settings.from_environment().image_folder is None
    monkeypatch.setenv("GARSERVE_SERVE_IMAGE_FOLDER", str(tmp_path))
    assert plugged_in(monkeypatch).state.garserve_settings.image_folder == tmp_path
    monkeypatch.setenv("GARSERVE_SERVE_IMAGE_FOLDER", str(tmp_path / "none"))
    with pytest.raises(RequestError, match=r"GARSERVE_SERVE_IMAGE_FOLDER: expected a folder, got '.*none'"):
        plugged_in(monkeypatch)


@pytest.mark.parametrize("folder", ["", "/none/such"])
def test_the_option_of_the_folder_of_images(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    from garserve.cli import app
    from garserve.serving import launch

    monkeypatch.setattr(launch, "serve", lambda _: pytest.fail("it was served"))
    result = CliRunner().invoke(app, ["serve", "tiny", "--image-folder", folder])
    assert isinstance(result.exception, RequestError)
    assert str(result.exception) == f"--image-folder: expected a folder, got {folder!r}"


@pytest.mark.parametrize("prefix", ["", "/page"], ids=["the proxy cuts", "the proxy keeps"])
def test_a_root_path_named_as_the_page_opens_nothing(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    app = plugged_in(monkeypatch, root_path="/page", api_keys=("secret",))
    for method, path in (("POST", CHAT), ("POST", "/v1/regions/describe"), ("GET", "/v1/models"), ("GET", "/load")):
        assert asked(app, method, prefix + path).status_code == 401, path
    assert asked(app, "GET", f"{prefix}/load", headers=KEY).status_code == 200


@pytest.mark.parametrize("prefix", ["", "/gar"], ids=["the proxy cuts", "the proxy keeps"])
def test_what_needs_no_key_needs_none_under_a_root_path(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    app = plugged_in(monkeypatch, root_path="/gar", api_keys=("secret",))
    for path in ("/", "/page/style.css", "/openapi.json"):
        assert asked(app, "GET", prefix + path).status_code == 200, path
    for path in ("/health", "/ready"):  # there is no engine
        assert asked(app, "GET", prefix + path).status_code != 401, path
    assert asked(app, "GET", f"/other{prefix}/page/style.css").status_code == 401


def test_probes_under_a_root_path_are_not_worth_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from garserve.serving.logs import logger

    lines: list[str] = []
    monkeypatch.setattr(logger, "info", lambda _, extra: lines.append(extra["fields"]["path"]))
    app = plugged_in(monkeypatch, root_path="/gar")
    health: tuple[bool, str | None] = (True, None)
    app.state.garserve_lifecycle = Namespace(state_of_health=lambda: health)
    for path in ("/gar/health", "/gar/ready", "/ready", "/gar/page/style.css"):
        assert asked(app, "GET", path).status_code == 200
    assert lines == ["/gar/page/style.css"]
    health = (False, "the engine has stopped")
    assert asked(app, "GET", "/gar/health").status_code == 503
    assert lines[1:] == ["/gar/health"]


def test_the_load_is_what_is_in_work(monkeypatch: pytest.MonkeyPatch) -> None:
    app = plugged_in(monkeypatch)
    for count in range(3):
        assert asked(app, "GET", "/load").json() == {"server_load": count}
        app.state.garserve_admission.enter()
    for _ in range(3):
        app.state.garserve_admission.leave()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_takes_nothing_of_its_answer_is_counted_once(stream: bool) -> None:
    from starlette.requests import Request
    from starlette.responses import Response

    from garserve.serving import metrics
    from garserve.serving.admission import Admission
    from garserve.serving.answering import stream_response
    from garserve.serving.gate import Gate
    from garserve.serving.settings import Settings

    async def events() -> AsyncIterator[str]:
        while True:
            yield "data: {}\n\n"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        answer = stream_response(Request(scope, receive), events(), None) if stream else Response("whole")
        await answer(scope, receive, send)

    async def silent() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def stuck(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def ask() -> dict[str, Any]:
        gate = Gate(app, settings=Settings(send_seconds=0.05), admission=Admission(1))
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "asgi": {}}
        await asyncio.wait_for(gate(scope, silent, stuck), 60)
        return dict(scope["garserve.facts"])

    before = metrics.disconnected._value.get()
    assert asyncio.run(ask()) == {"stalled": True, "disconnected": True}
    assert metrics.disconnected._value.get() == before + 1
