"""Requests about one image that are asked together find its tokens in the prefix cache, however full a step is."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import garserve
from garserve.bench.workload import Workload, make_workload
from garserve.inputs.request import RegionRequest

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
pytestmark = pytest.mark.vllm

GROUP, BLOCK, IMAGE = 4, 32, 128  # regions of a group; tokens of a KV block and of the image


def _groups() -> Workload:
    """Twelve questions in three groups, each of which has an image item of its own."""
    return make_workload("dense", 1, (640, 480), max_tokens=8, group=GROUP, regions=3 * GROUP)


def _answers(**options: Any) -> list[garserve.Answer]:
    """Answer all questions. The engine is held until all are there, however slowly they are made."""
    options |= {"dtype": "float32", "block_size": BLOCK}
    all_there, asked = threading.Event(), _groups().requests

    def requests() -> Iterator[RegionRequest]:
        try:
            yield from asked
        finally:
            all_there.set()

    with garserve.load("tiny", "vllm", max_num_batched_tokens=128, **options) as engine:
        driver = engine.backend.driver  # type: ignore[attr-defined]
        driver._send(lambda: all_there.wait(600))
        return list(engine.describe_many(requests(), in_flight=len(asked) + 1))


def test_all_of_a_group_but_its_first_share_the_image() -> None:
    patient, impatient = _answers(), _answers(scheduler_cls=None)
    cached = [answer.cached_tokens for answer in patient]
    before_image = cached[GROUP]  # of the second group's first request, which has an image item of its own
    followers = [tokens for position, tokens in enumerate(cached) if position % GROUP]
    assert min(followers) >= before_image + IMAGE - BLOCK
    lost = [answer.cached_tokens for answer in impatient].count(before_image) - cached.count(before_image)
    assert lost > 0, "vLLM's own scheduler shares as much: ours has nothing left to do"
    assert [answer.token_ids for answer in patient] == [answer.token_ids for answer in impatient]


def test_an_image_that_no_step_takes_with_the_text_before_it_is_not_waited_for() -> None:
    """`disable_chunked_mm_input` puts an image whole into one step; text and image together are longer than that."""
    request = _groups().requests[0]
    request = replace(request, system="word " * 20)
    options = {"dtype": "float32", "block_size": BLOCK, "max_num_batched_tokens": 128}
    with garserve.load("tiny", "vllm", disable_chunked_mm_input=True, **options) as engine:
        one, two = engine.describe_many([request, request])
    assert one.token_ids == two.token_ids != []


@pytest.mark.parametrize("ahead", [False, True])
def test_the_scheduler_is_of_the_kind_that_vllm_would_take(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config.scheduler import SchedulerConfig

    from garserve.vllm_plugin import scheduler

    monkeypatch.setattr(scheduler.Scheduler, "__init__", lambda self, **given: None)
    monkeypatch.setattr(scheduler.AsyncScheduler, "__init__", lambda self, **given: None)
    config = SchedulerConfig.default_factory(async_scheduling=ahead)
    made = scheduler.make_scheduler(vllm_config=SimpleNamespace(scheduler_config=config))
    assert isinstance(made, config.get_scheduler_cls())
    assert isinstance(made, scheduler.PatientAsyncScheduler) == ahead
