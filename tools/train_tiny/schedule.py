"""What is trained at which step, and how fast."""

from dataclasses import dataclass
from typing import Literal

Phase = Literal["heads", "tower", "decoder", "all"]
_WARM_UP = 100


@dataclass(frozen=True)
class Schedule:
    """`steps` in all: first `heads` of the dropped heads, `tower`, `decoder` (on a frozen tower), then everything."""

    steps: int
    heads: int
    tower: int
    decoder: int

    def __post_init__(self) -> None:
        first = self.heads + self.tower + self.decoder
        if first > self.steps:
            raise SystemExit(f"steps: expected at least the {first} of the first phases, got {self.steps}")

    @classmethod
    def further(cls, steps: int) -> "Schedule":
        """For a checkpoint that is trained already; a tenth of the steps, at most 60, is for heads that it lacks."""
        return cls(steps, min(steps // 10, 60), 0, 0)

    @property
    def phases(self) -> dict[str, int]:
        """The first phases' steps by their names; `steps` alone may grow while it is trained."""
        return {"heads": self.heads, "tower": self.tower, "decoder": self.decoder}

    def phase(self, step: int) -> Phase:
        """Return what learns at a step."""
        if step < self.heads:
            return "heads"
        if step < self.heads + self.tower:
            return "tower"
        return "decoder" if step < self.heads + self.tower + self.decoder else "all"

    def rate(self, step: int) -> float:
        """Return the factor of the learning rate.

        Heads: 1. The tower alone: warm up and fall to 0.3. With the decoder: warm up, and fall from 0.7 to nearly
        nothing.
        """
        phase = self.phase(step)
        if phase == "heads":
            return 1.0
        if phase == "tower":
            return min((step + 1 - self.heads) / _WARM_UP, 1 - 0.7 * (step - self.heads) / self.tower)
        before = self.heads + self.tower
        return 0.7 * min((step + 1 - before) / _WARM_UP, max(0.01, (self.steps - step) / (self.steps - before)))
