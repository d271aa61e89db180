"""Requests of every form, for tests that compare engines."""

import numpy as np

from garserve.engine import Engine
from garserve.inputs.request import RegionRequest

REGIONS = [{"box": [5, 5, 60, 50]}, {"points": [[100, 60]], "radius": 12}, {"polygon": [[70, 5], [130, 10], [100, 40]]}]


def mixed_requests(picture: np.ndarray) -> list[RegionRequest]:
    """Requests of every form on several images, so that one step holds items of many."""
    requests = [RegionRequest(picture, [region], max_tokens=12) for region in REGIONS]
    requests += [
        RegionRequest(picture[:, ::-1].copy(), REGIONS[:n], f"Compare {n}.", max_tokens=6 + n) for n in (1, 2, 3)
    ]
    requests += [RegionRequest(picture[:30, :100], [{"box": [0, 0, 20, 20]}], "What is <Prompt0>?", max_tokens=9)]
    requests += [RegionRequest(picture, REGIONS, "Only <Prompt2>?", focus=[2], max_tokens=9)]
    return requests


def tokens(engine: Engine, requests: list[RegionRequest]) -> list[list[int]]:
    return [answer.token_ids for answer in engine.describe_many(requests)]
