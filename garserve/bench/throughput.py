"""Many requests at once: answers, images and tokens a second."""

import time
from statistics import median

from garserve.answers import Answer
from garserve.bench.cost import prefill_flops, tile_flops
from garserve.bench.machine import peaks
from garserve.bench.result import Result, Row
from garserve.bench.runtime import runtime
from garserve.bench.workload import Workload
from garserve.engine import Engine
from garserve.inputs.request import RegionRequest


def throughput(engine: Engine, workload: Workload, warm: RegionRequest, conditions: str, *, in_flight: int) -> Result:
    """Answer a workload once, and return its rates with the time that its FLOPs take at least on this machine."""
    list(engine.describe_many([warm]))
    before = engine.tile_counts
    start = time.perf_counter()
    answers = list(engine.describe_many(workload.requests, in_flight=in_flight))
    seconds = time.perf_counter() - start
    after = engine.tile_counts
    computed, asked = after.computed - before.computed, after.asked - before.asked
    config, ran = engine.processor.config, runtime(engine)
    prefill = sum(prefill_flops(config, one.prompt_tokens, one.cached_tokens) for one in answers)
    limit = prefill / peaks(ran.dtype).flops + computed * tile_flops(config) / peaks(ran.tower_peak).flops
    tokens = sum(len(one.token_ids) for one in answers)
    row: Row = {
        "workload": workload.name,
        "answers/s": len(answers) / seconds,
        "images/s": workload.images / seconds,
        "answer tokens/s": tokens / seconds,
        "prompt tokens/s": sum(one.prompt_tokens for one in answers) / seconds,
        "prefilled an answer": _prefilled(answers),
        "tiles computed": computed / max(asked, 1),
        "seconds": seconds,
        "limit s": limit,
        "of limit": limit / seconds,
    }
    described = (
        f"{conditions}; {ran}; {workload.images} images, {len(answers)} requests, at most {in_flight} at a time; "
        f"{median(len(one.token_ids) for one in answers):g} tokens an answer; limit: FLOPs of tiles (in "
        f"{ran.tower_peak}) and prefill (in {ran.dtype}) over the measured peak of a matrix product"
    )
    return Result("throughput", described, [row])


def _prefilled(answers: list[Answer]) -> float:
    return sum(one.prompt_tokens - one.cached_tokens for one in answers) / len(answers)
