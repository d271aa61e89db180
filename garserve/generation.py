"""What passes between an engine and the backend that decodes for it (floor 1)."""

import logging
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How to decode one request. Temperature 0 takes the most probable token each time."""

    stop_id: int
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    stream: bool = False
    first_logits: bool = False  # for conformance: report the logits of the first step


@dataclass(frozen=True)
class Progress:
    """Tokens that a request has gained since the last report, and what is known when it has ended."""

    new_token_ids: list[int]
    finish_reason: str | None = None  # "stop" or "length"; None while it runs
    cached_tokens: int = 0
    first_logits: list[float] | None = None


Report = Progress | Exception
OnReport = Callable[[Report], None]


def deliver(on_report: OnReport, report: Report) -> bool:
    """Call a caller's function and return whether it took the report; what it raises is its own affair."""
    try:
        on_report(report)
    except Exception:
        logging.getLogger(__name__).debug("a report was not taken", exc_info=True)
        return False
    return True
