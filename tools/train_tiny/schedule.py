"""What is trained at which step, and how fast."""

from dataclasses import dataclass
from typing import Literal

Phase = Literal["heads", "tower", "decoder", "all"]
_WARM_UP = 100


@dataclass(frozen=True)
class Schedule:
    """`steps` in all: first `heads` of the dropped heads, `tower`, `decoder` (on a frozen tower), then everything.

    The last `groups` of them have examples of many regions besides, which begin with a warm-up of their own.
    """

    steps: int
    heads: int
    tower: int
    decoder: int
    groups: int

    def __post_init__(self) -> None:
        phases = self.heads + self.tower + self.decoder + self.groups
        if phases > self.steps:
            raise SystemExit(f"steps: expected at least the {phases} of the phases, got {self.steps}")

    @classmethod
    def further(cls, steps: int) -> "Schedule":
        """For a checkpoint that is trained already; a tenth of the steps, at most 60, is for heads that it lacks."""
        return cls(steps, min(steps // 10, 60), 0, 0, 0)

    @property
    def phases(self) -> dict[str, int]:
        """The phases' steps by their names; `steps` alone may grow while it is trained."""
        return {"heads": self.heads, "tower": self.tower, "decoder": self.decoder, "groups": self.groups}

    def phase(self, step: int) -> Phase:
        """Return what learns at a step."""
        if step < self.heads:
            return "heads"
        if step < self.heads + self.tower:
            return "tower"
        return "decoder" if step < self.heads + self.tower + self.decoder else "all"

    def has_groups(self, step: int) -> bool:
        """Say whether a step has examples of many regions besides."""
        return step >= self.steps - self.groups

    def rate(self, step: int) -> float:
        """Return the factor of the learning rate.

        Heads: 1. The tower alone: warm up and fall to 0.3. With the decoder: warm up, and fall from 0.7 to nearly
        nothing; and so from 0.15, with the examples of many regions.
        """
        phase = self.phase(step)
        if phase == "heads":
            return 1.0
        if phase == "tower":
            return min((step + 1 - self.heads) / _WARM_UP, 1 - 0.7 * (step - self.heads) / self.tower)
        first, last = self.heads + self.tower, self.steps - self.groups
        if self.has_groups(step):
            return 0.15 * _up_and_down(step, last, self.steps, _WARM_UP // 3)
        return 0.7 * _up_and_down(step, first, last, _WARM_UP)


def _up_and_down(step: int, first: int, last: int, warm_up: int) -> float:
    return min((step + 1 - first) / warm_up, max(0.01, (last - step) / (last - first)))
