"""One request at a time: where its time goes, from the image's pixels to the answer's text."""

import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

from garserve.bench.cost import decode_bytes, prefill_flops, replay_bytes, tile_flops
from garserve.bench.machine import peaks
from garserve.bench.result import Result, Row
from garserve.bench.runtime import Runtime, runtime, stages_seen
from garserve.config import GARConfig
from garserve.engine import Engine
from garserve.errors import GarserveError, RequestError
from garserve.generation import Report, Sampling
from garserve.inputs.request import RegionRequest
from garserve.tracing import Span, recording

STAGES = ("preprocess", "hand over", "vision", "replay", "prefill", "decode", "engine", "decode text", "between")
_UNNAMED = 0.05  # of a request's time that no span may have


@dataclass(frozen=True)
class Timeline:
    """One request: seconds of each stage, to the first token, between tokens, to the end; and how much there was."""

    stages: dict[str, float]
    ttft: float
    itl: list[float]
    e2e: float
    prompt_tokens: int
    cached_tokens: int
    token_ids: list[int]
    tiles: int  # computed
    regions: int

    @property
    def front(self) -> float:
        """Seconds of the front process beyond preprocessing: all that is neither preprocessing nor a step."""
        return self.stages["hand over"] + self.stages["decode text"] + self.stages["between"]


def measure(engine: Engine, request: RegionRequest) -> tuple[Timeline, list[Span]]:
    """Answer one request alone, and return its timeline with the spans of its road."""
    reports: queue.SimpleQueue[tuple[float, Report]] = queue.SimpleQueue()
    before, graphs = engine.tile_counts.computed, runtime(engine).graphs
    with recording() as spans:
        start = time.perf_counter()
        prepared = engine.processor(request)
        sampling = Sampling(engine.stop_id, request.max_tokens, stream=True)
        engine.backend.submit(prepared, sampling, lambda report: reports.put((time.perf_counter(), report)))
        ids: list[int] = []
        arrivals: list[float] = []
        while True:
            when, report = reports.get()
            if isinstance(report, Exception):
                raise report
            ids += report.new_token_ids
            arrivals += [when] * len(report.new_token_ids)
            if report.finish_reason:
                break
        answer = engine.finished(prepared, report, ids)
        end = time.perf_counter()
        engine.tile_counts  # noqa: B018  (the engine's thread has left its last span when it answers)
    timeline = Timeline(
        _stages(spans, arrivals[0], end - start, graphs=graphs),
        arrivals[0] - start,
        [after - one for one, after in pairwise(arrivals)],
        end - start,
        answer.prompt_tokens,
        answer.cached_tokens,
        ids,
        engine.tile_counts.computed - before,
        len(prepared.items) - 1,
    )
    return timeline, list(spans)


def _stages(spans: Sequence[Span], first_token: float, whole: float, *, graphs: bool = False) -> dict[str, float]:
    """Sum the spans of each stage; `engine` is what a step does beside the model, `between` what no span names.

    With `graphs`, whole steps after the first token are `decode`: the model in them has no span.
    """

    def total(name: str, *, before: float = float("inf"), after: float = 0.0) -> float:
        return sum(one.seconds for one in spans if one.name == name and after <= one.start < before)

    found = {name: total(name) for name in ("preprocess", "hand over", "vision", "replay", "decode text")}
    found["prefill"] = total("decoder", before=first_token)
    found["decode"] = total("engine step" if graphs else "decoder", after=first_token)
    model = sum(found[name] for name in ("vision", "replay", "prefill", "decode"))
    found["engine"] = total("engine step") - model
    found["between"] = whole - sum(found.values())
    return found


def latency(
    engine: Engine, requests: Sequence[RegionRequest], warm: RegionRequest, conditions: str
) -> tuple[Result, list[Span]]:
    """Answer `warm`, then each request alone, and return medians with the spans of the last one.

    Raises RequestError for an engine whose model runs in another process, GarserveError where the stages do not sum to
    the whole within 5 %.
    """
    if not stages_seen(engine):
        raise RequestError(
            "latency: expected an engine that runs its model in this process, where its stages are seen, got one with "
            "separate_process or several ranks; `garserve bench throughput` measures it as a whole"
        )
    measure(engine, warm)
    measured = [measure(engine, request) for request in requests]
    lines = [timeline for timeline, _ in measured]
    unnamed = median(abs(line.stages["between"]) / line.e2e for line in lines)
    if unnamed > _UNNAMED:
        raise GarserveError(f"latency: {unnamed:.1%} of the time is in no stage, limit {_UNNAMED:.0%}: no figures")
    ran = runtime(engine)
    rows = _stage_rows(lines, engine.processor.config, ran)
    rows.append({"stage": "TTFT", "milliseconds": 1e3 * median(line.ttft for line in lines)})
    if gaps := [gap for line in lines for gap in line.itl]:  # answers of one token have none
        rows.append({"stage": "ITL", "milliseconds": 1e3 * median(gaps)})
    rows += [
        {"stage": "E2E", "milliseconds": 1e3 * median(line.e2e for line in lines), "share": 1.0},
        {"stage": "front beyond preprocessing", "milliseconds": 1e3 * median(line.front for line in lines)},
    ]
    tokens = median(len(line.token_ids) for line in lines)
    described = f"{conditions}; {ran}; {len(lines)} requests one after the other, medians; {tokens:g} tokens an answer"
    described += f"; limits: measured peaks of {ran.tower_peak} for tiles, of {ran.dtype} for the rest"
    notes = [f"stages sum to the whole within {unnamed:.2%} (between: what no span names)"]
    if torch.cuda.is_available():
        notes.append("each stage is waited for, so that the GPU never works ahead, as it does in throughput and serve")
    return Result("latency", described, rows, notes), measured[-1][1]


def _stage_rows(lines: Sequence[Timeline], config: GARConfig, ran: Runtime) -> list[Row]:
    limits = _limits(lines, config, ran)
    rows: list[Row] = []
    for name in STAGES:
        seconds = median(line.stages[name] for line in lines)
        row: Row = {"stage": name, "milliseconds": 1e3 * seconds}
        row["share"] = median(line.stages[name] / line.e2e for line in lines)
        if name in limits and seconds > 0:
            row |= {"limit ms": 1e3 * limits[name], "of limit": limits[name] / seconds}
        rows.append(row)
    return rows


def _limits(lines: Sequence[Timeline], config: GARConfig, ran: Runtime) -> dict[str, float]:
    """Seconds that each stage takes at least, on the measured peaks of this machine."""
    peak, line = peaks(ran.dtype), sorted(lines, key=lambda one: one.e2e)[len(lines) // 2]
    element = 4 if ran.dtype == "float32" else 2
    steps = max(len(line.token_ids) - 1, 0)
    return {
        "vision": line.tiles * tile_flops(config) / peaks(ran.tower_peak).flops,
        "replay": line.regions * replay_bytes(config, element) / peak.bytes,
        "prefill": prefill_flops(config, line.prompt_tokens, line.cached_tokens) / peak.flops,
        "decode": steps * decode_bytes(config, line.prompt_tokens + steps // 2, element) / peak.bytes,
    }
