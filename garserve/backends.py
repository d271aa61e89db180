"""What every backend of the engine can do (floor 4)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from garserve.generation import OnReport, Sampling
from garserve.inputs.processor import PreparedRequest

if TYPE_CHECKING:
    from garserve.model.tile_cache import TileCounts


class Backend(Protocol):
    """What decodes prepared requests. Reports may come from another thread."""

    name: str

    def submit(self, prepared: PreparedRequest, sampling: Sampling, on_report: OnReport) -> Callable[[], None]:
        """Queue a request and return a function that cancels it."""

    def tile_counts(self) -> "TileCounts":
        """Return what became of the tiles so far."""

    def token_room(self) -> int | None:
        """Return how many tokens of prompts and answers are kept at a time; None where nothing bounds them."""

    def close(self) -> None:
        """Give everything back."""
