"""What the routes share: settings, preparation, the engine, and the state of the server's life."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from garserve.serving.admission import Admission
from garserve.serving.decoding import RegionEngineClient
from garserve.serving.errors import APIError
from garserve.serving.preparation import Preparer
from garserve.serving.settings import Settings

if TYPE_CHECKING:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat


@dataclass
class Service:
    """One API process's own; found at `app.state.garserve`."""

    settings: Settings
    admission: Admission
    preparer: Preparer
    engine: RegionEngineClient
    chat: "OpenAIServingChat"
    stop_id: int
    model_names: list[str]
    max_model_len: int
    seeds: bool = True  # whether the engine survives requests with seeds of their own
    started: int = field(default_factory=lambda: int(time.time()))
    region_places: asyncio.Semaphore = field(init=False)  # of all descriptions together

    def __post_init__(self) -> None:
        """Make what settings bound."""
        self.region_places = asyncio.Semaphore(self.settings.regions_in_flight)

    @property
    def prompt_count(self) -> int:
        """How many regions one prompt takes."""
        return self.preparer.processor.config.prompt_count

    def check_model(self, name: str | None) -> None:
        """Raise a 404 for a model that is not served here."""
        if name is not None and name not in self.model_names:
            served = ", ".join(self.model_names)
            raise APIError(
                404, f"model: {name!r:.80} is not served here; {served} is", code="model_not_found", param="model"
            )

    def check_seed(self, seed: int | None, temperature: float | None) -> None:
        """Raise a 400 for a seed that would stop the engine.

        vLLM's CPU build ends with «CPU Generator does not use offset» when a prompt with a seed is prefilled in parts.
        Without a temperature, nothing is drawn, and a seed has no meaning.
        """
        if seed is not None and temperature and not self.seeds:
            raise APIError(400, "seed: vLLM's CPU build takes none with a temperature above 0", param="seed")

    def check_length(self, tokens: int, field: str) -> None:
        """Raise a 400 that names the field for a prompt that leaves no room for an answer."""
        if tokens >= self.max_model_len:
            raise APIError(
                400,
                f"{field}: {tokens} tokens with the image; expected fewer than {self.max_model_len}",
                code="context_length_exceeded",
                param=field,
            )


def service(request: Request) -> Service:
    """Return the service of the app that a request came to."""
    found: Service = request.app.state.garserve
    return found


def note(request: Request, **facts: Any) -> None:
    """Add facts to the request's line in the log."""
    request.scope.setdefault("garserve.facts", {}).update(facts)


def request_id(request: Request) -> str:
    """Return the id under which the request is logged."""
    return str(request.scope.get("garserve.request_id", "none"))
