"""What load on a server shows: percentiles of TTFT, TPOT, ITL and E2E, and goodput under limits."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from garserve.bench.load import Outcome, base_url, closed_loop, open_loop
from garserve.bench.result import Result, Row
from garserve.errors import GarserveError

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Limits:
    """Service level: seconds that a request may take to be a good one; None asks nothing."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def kept(self, outcome: Outcome) -> bool:
        """Say whether an answered request kept all of them."""
        pairs = ((outcome.ttft, self.ttft), (outcome.tpot, self.tpot), (outcome.e2e, self.e2e))
        return all(limit is None or value <= limit for value, limit in pairs)

    def __str__(self) -> str:
        named = [f"{name} {limit:g} s" for name, limit in vars(self).items() if limit is not None]
        return ", ".join(named) or "none"


def serve(
    url: str,
    requests: Sequence[dict[str, Any]],
    conditions: str,
    limits: Limits,
    *,
    warm: Sequence[dict[str, Any]] = (),
    rate: float | None = None,
    clients: int = 1,
    seed: int = 0,
) -> Result:
    """Load the server at `url`: open loop with `rate` requests a second, closed loop with `clients` where it is None.

    Requests in `warm` are sent first, one after the other, and not counted.
    Raises RequestError where `url` is no address, GarserveError where nothing was answered; failed requests are
    counted, with the time that they took, and never good.
    """
    base = base_url(url)
    asyncio.run(closed_loop(base, warm, 1))
    if rate is None:
        outcomes = asyncio.run(closed_loop(base, requests, clients))
    else:
        outcomes = asyncio.run(open_loop(base, requests, rate, seed))
    answered = [one for one in outcomes if one.error is None]
    errors = [one.error for one in outcomes if one.error is not None]
    if not answered:
        raise GarserveError(f"serve: none of {len(outcomes)} requests was answered: {errors[0] if errors else url}")
    rows = _percentiles(answered)
    seconds = max(one.ended for one in outcomes) - min(one.due for one in outcomes)
    good = sum(limits.kept(one) for one in answered)
    rates: dict[str, float] = {
        "requests/s": len(answered) / seconds,
        "answer tokens/s": sum(one.tokens for one in answered) / seconds,
        "goodput, requests/s": good / seconds,
        "good share": good / len(outcomes),
        "failed": float(len(errors)),
    }
    rows += [{"figure": name, "value": value} for name, value in rates.items()]
    how = f"{clients} clients, closed loop" if rate is None else f"{rate:g} requests/s, open loop (Poisson)"
    notes = [f"first failure: {errors[0]}"] if errors else []
    described = f"{url}: {conditions}; {len(outcomes)} requests, {how}; limits of a good request: {limits}"
    return Result("serve", described, rows, notes)


def _percentiles(answered: Sequence[Outcome]) -> list[Row]:
    columns = {
        "TTFT": [one.ttft for one in answered],
        "TPOT": [one.tpot for one in answered if one.tokens > 1],
        "ITL": [gap for one in answered for gap in one.itl],
        "E2E": [one.e2e for one in answered],
    }
    rows: list[Row] = []
    for name, values in columns.items():
        if not values:  # of answers of one token
            continue
        found = np.percentile(values, _PERCENTILES)
        percentiles = {f"p{p} ms": 1e3 * float(value) for p, value in zip(_PERCENTILES, found, strict=True)}
        rows.append({"figure": name, **percentiles})
    return rows
