"""How many requests are in the engine at a time: bounded by their number and by the room that their tokens take."""

from dataclasses import dataclass


@dataclass
class Admission:
    """Lets requests in while all of them fit with their longest answers, so that none has to be computed twice.

    `token_room` is what the engine's KV cache holds; None where it has no such bound.
    """

    most_requests: int
    token_room: int | None = None
    requests: int = 0
    tokens: int = 0

    def admits(self, tokens: int) -> bool:
        """Say whether a request of so many tokens, its longest answer counted, may go in; a lone one always may."""
        if self.requests == 0:
            return True
        fits = self.token_room is None or self.tokens + tokens <= self.token_room
        return self.requests < self.most_requests and fits

    def enter(self, tokens: int) -> None:
        """Count a request that goes in."""
        self.requests += 1
        self.tokens += tokens

    def leave(self, tokens: int) -> None:
        """Count a request that has come out."""
        self.requests -= 1
        self.tokens -= tokens
