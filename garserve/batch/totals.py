"""What a job has done so far."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Totals:
    """Counts and times of one run; `before` are rows that earlier runs had written to the output, of any input."""

    total: int | None = None  # records of the input that pass the filters, where known
    before: int = 0
    errors_before: int = 0  # of those
    met: int | None = None  # of those, records that the filters let through, as far as the input was read; if counted
    unmet: frozenset[str] = frozenset()  # ids that were asked for, and that the input, read to its end, does not have
    rows: int = 0
    errors: int = 0
    regions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    worker_deaths: int = 0
    engine_restarts: int = 0
    idle_seconds: float = 0.0  # the engine had nothing to do, and the input had not ended
    forms: dict[str, int] = field(default_factory=dict)
    tiles: int = 0
    tiles_computed: int = 0
    begun: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Count a row of the output."""
        self.rows += 1
        if "error" in row:
            self.errors += 1
            return
        self.regions += row.get("asked", len(row["regions"]))
        self.prompt_tokens += row["prompt_tokens"]
        self.cached_tokens += row["cached_tokens"]
        self.answer_tokens += row["answer_tokens"]
        self.forms[row["form"]] = self.forms.get(row["form"], 0) + 1

    def counting(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Pass on rows of an earlier run, and count the errors among them."""
        for row in rows:
            self.errors_before += "error" in row
            yield row

    @property
    def done(self) -> int:
        """Records of the input that pass the filters and have rows; where nobody counts them, at most the total."""
        if self.met is not None:
            return self.met + self.rows
        known = self.before + self.rows
        return known if self.total is None else min(known, self.total)

    def elapsed(self) -> float:
        """Return seconds since the job began, or that it took."""
        return self.seconds or max(time.monotonic() - self.begun, 1e-9)

    @property
    def regions_per_second(self) -> float:
        """Regions that were asked about, per second of this run."""
        return self.regions / self.elapsed()

    @property
    def tokens_per_second(self) -> float:
        """Tokens prefilled and decoded, per second of this run."""
        return (self.prompt_tokens - self.cached_tokens + self.answer_tokens) / self.elapsed()

    @property
    def tile_hit_rate(self) -> float | None:
        """Share of the tiles asked for that did not have to be computed; None where none was asked for."""
        return 1 - self.tiles_computed / self.tiles if self.tiles else None

    @property
    def idle_share(self) -> float:
        """Share of the run in which the engine waited for input."""
        return self.idle_seconds / self.elapsed()

    def eta_seconds(self) -> float | None:
        """Return how long the rest will take at the rate so far; None where nothing is known."""
        if self.total is None or not self.rows:
            return None
        return max(self.total - self.done, 0) * self.elapsed() / self.rows

    def as_json(self) -> dict[str, Any]:
        """Return everything for machines."""
        names: tuple[str, ...] = (
            "total",
            "before",
            "errors_before",
            "rows",
            "errors",
            "regions",
            "prompt_tokens",
            "cached_tokens",
            "answer_tokens",
        )
        names += ("worker_deaths", "engine_restarts", "forms", "tiles", "tiles_computed")
        hit_rate = self.tile_hit_rate
        return {name: getattr(self, name) for name in names} | {
            "seconds": round(self.elapsed(), 3),
            "regions_per_second": round(self.regions_per_second, 3),
            "tokens_per_second": round(self.tokens_per_second, 3),
            "tile_hit_rate": None if hit_rate is None else round(hit_rate, 4),
            "engine_idle_seconds": round(self.idle_seconds, 3),
            "engine_idle_share": round(self.idle_share, 4),
        }
