"""The well-formed requests of the load: as bodies for a server, and as the engine is asked directly."""

import base64
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import garserve
from garserve.inputs.request import RegionRequest

PHOTO = Path(garserve.__file__).parent / "data" / "coffee.jpg"
QUESTIONS = ("Where is <Prompt0> relative to <Prompt1>?", "What colour is <Prompt1>?", "Which is larger?")


@dataclass(frozen=True)
class Ask:
    """A well-formed request: its body, and what the engine is asked directly."""

    body: bytes
    request: RegionRequest


def make_asks(rng: random.Random, count: int, max_tokens: int) -> list[Ask]:
    """Return `count` requests that differ: crops of a photograph with regions of every form, half of them streamed."""
    photo = Image.open(PHOTO).convert("RGB")
    asks = []
    for number in range(count):
        width, height = rng.randrange(300, 600), rng.randrange(250, 400)
        crop = photo.crop((0, 0, width, height))
        file = io.BytesIO()
        crop.save(file, "JPEG", quality=85)
        regions = [_region(rng, width, height) for _ in range(rng.choice((1, 2, 2, 3, 5)))]
        question = None if len(regions) == 1 else rng.choice(QUESTIONS)
        content: list[dict[str, Any]] = [
            {
                "type": "image_url",
                "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()},
                "regions": regions,
            }
        ]
        if question is not None:
            content.append({"type": "text", "text": question})
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "stream": number % 2 == 0}
        request = RegionRequest(file.getvalue(), regions, question, max_tokens=max_tokens)
        asks.append(Ask(json.dumps(body).encode(), request))
    return asks


def _region(rng: random.Random, width: int, height: int) -> dict[str, Any]:
    x, y = rng.randrange(10, width - 90), rng.randrange(10, height - 90)
    return rng.choice(
        (
            {"box": [x, y, x + 70, y + 60]},
            {"points": [[x, y], [x + 30, y + 20]], "radius": 12},
            {"polygon": [[x, y], [x + 80, y + 10], [x + 30, y + 70]]},
            {"scribble": [[x, y], [x + 60, y + 50], [x + 20, y + 70]], "width": 9},
            {"rle": {"size": [height, width], "counts": _runs(x, y, width, height)}},
        )
    )


def _runs(x: int, y: int, width: int, height: int) -> list[int]:
    mask = np.zeros((height, width), bool)
    mask[y : y + 50, x : x + 40] = True
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    return [int(run) for run in np.diff([0, *edges, flat.size])]
