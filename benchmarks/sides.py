"""Those that are compared: which requests of a round each is given, in which batches, and what came of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from garserve.inputs.request import RegionRequest


@dataclass
class Side:
    """One of those compared: how it answers requests, how many it is given in a round, and what came of it."""

    name: str
    run: Callable[[Sequence[RegionRequest]], list[list[int]]]
    share: int | None  # requests of a round; None: all
    batch: int | None = None  # requests that it takes at a time; None: it chooses
    rates: list[float] = field(default_factory=list)  # answers a second of each round that counts
    tokens: dict[int, list[int]] = field(default_factory=dict)  # by the request's position


def taken(side: Side, count: int, group: int) -> list[int]:
    """Return the positions of the requests that a side answers: neighbours from a group's first on, moving on."""
    if side.share is None or side.share >= count:
        return list(range(count))
    start = (len(side.rates) * side.share) % (count - side.share + 1)
    start -= start % group  # a careful user's batch is a group, not parts of two
    return list(range(start, start + side.share))


def told(side: Side, count: int) -> str:
    """Return how many of a round's `count` requests a side answers, and in batches of which sizes."""
    share = min(side.share or count, count)
    if side.batch is None:
        return f"{side.name} {share}"
    if side.batch == 1:
        return f"{side.name} {share}, one at a time"
    sizes = [size for size in (side.batch if share >= side.batch else 0, share % side.batch) if size]
    return f"{side.name} {share}, in batches of {' and '.join(map(str, sizes))} neighbours"


def time_side(side: Side, requests: Sequence[RegionRequest], group: int, *, counted: bool) -> None:
    """Let a side answer its part of a round; its rate is kept where the round counts."""
    positions = taken(side, len(requests), group)
    start_time = time.perf_counter()
    tokens = side.run([requests[position] for position in positions])
    seconds = time.perf_counter() - start_time
    side.tokens = dict(zip(positions, tokens, strict=True))
    if counted:
        side.rates.append(len(positions) / seconds)


def compare(sides: Sequence[Side]) -> None:
    """Hold the tokens of all against the first's. Raises SystemExit where some differ."""
    ours = sides[0].tokens
    for side in sides[1:]:
        wrong = [position for position, tokens in side.tokens.items() if tokens != ours[position]]
        if wrong:
            at = wrong[0]
            raise SystemExit(
                f"{side.name}: {len(wrong)} of {len(side.tokens)} answers differ from garserve's, the first of them "
                f"{side.tokens[at]} instead of {ours[at]}: no figures"
            )


def rates_and_ratios(sides: Sequence[Side]) -> dict[str, Any]:
    """Return everyone's answers a second by round, and the medians of the first's ratios to the others'."""
    figures: dict[str, Any] = {side.name: {"answers/s": [float(f"{r:.4g}") for r in side.rates]} for side in sides}
    for side in sides[1:]:
        ratios = [mine / theirs for mine, theirs in zip(sides[0].rates, side.rates, strict=True)]
        figures[f"{sides[0].name} / {side.name}"] = {"median": float(f"{median(ratios):.3g}"), "rounds": len(ratios)}
    return figures
