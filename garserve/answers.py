"""What a caller gets (floor 1)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """A finished answer. `finish_reason` is "stop" where the model ended it, "length" at `max_tokens`."""

    text: str
    token_ids: list[int]  # without the stop token
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    id: str | None = None


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer as it comes; the last one carries the whole."""

    text: str
    answer: Answer | None = None
