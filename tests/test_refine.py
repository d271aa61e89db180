"""`POST /v1/regions/refine`: GrabCut on pictures whose objects are known, other refiners, and refusals."""

import base64
import io
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from garserve.errors import RegionError, RequestError
from garserve.inputs.regions import Region
from garserve.serving.grabcut import GrabCut
from tests.page_server import make_app, serving

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
refine = pytest.importorskip("garserve.serving.refine")
cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed (pip install opencv-python-headless)")

DISC = np.hypot(*(np.mgrid[0:240, 0:320] - np.array([130, 180])[:, None, None])) < 55


def scene(disc: np.ndarray = DISC, *, seed: int = 0) -> np.ndarray:
    """A greenish textured disc on a brownish textured ground, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    colours = np.where(disc[..., None], (60, 140, 90), (150, 110, 80))
    return np.clip(colours + rng.normal(0, 18, (*disc.shape, 3)), 0, 255).astype(np.uint8)


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize(
    "region",
    [
        {"box": [115, 65, 250, 200]},
        {"polygon": [[120, 70], [245, 70], [250, 190], [110, 195]]},
        {"points": [[180, 130]], "radius": 8},
        {"points": [[150, 110], [210, 150]], "radius": 6},
        {"scribble": [[150, 120], [180, 150], [210, 120]], "width": 8},
        {"rle": {"size": [240, 320], "counts": [0, 240 * 320]}},
    ],
    ids=["box", "polygon", "point", "points", "scribble", "everything"],
)
def test_an_object_is_found(region: dict[str, Any]) -> None:
    image, marked = scene(), Region.parse(region)
    mask = GrabCut().refine(image, marked)
    assert mask.shape == (240, 320)
    assert mask.dtype == np.bool_
    assert overlap(mask, DISC) > 0.9
    assert np.array_equal(mask, GrabCut().refine(image, marked))


def test_a_large_image_costs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    large = DISC.repeat(2, axis=0).repeat(2, axis=1)
    sizes, plain = [], cv2.grabCut

    def counted(image: np.ndarray, *rest: Any) -> Any:
        sizes.append(max(image.shape))
        return plain(image, *rest)

    monkeypatch.setattr(cv2, "grabCut", counted)
    for region in ({"box": [230, 130, 500, 400]}, {"points": [[360, 260]], "radius": 16}):
        assert overlap(GrabCut().refine(scene(large), Region.parse(region)), large) > 0.9
    assert max(sizes) <= 400


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (3, 2), (60, 40)])
@pytest.mark.parametrize("noise", [False, True])
def test_nothing_to_find_is_what_was_drawn(shape: tuple[int, int], noise: bool) -> None:
    height, width = shape
    image = np.full((*shape, 3), 128, np.uint8)
    if noise:
        image = np.random.default_rng(1).integers(0, 255, image.shape).astype(np.uint8)
    for region in (
        {"box": [0, 0, width, height]},
        {"box": [0, 0, 1, 1]},
        {"points": [[width, height]], "radius": 2},
        {"scribble": [[0, 0], [width, height]], "width": 1},
    ):
        mask = GrabCut().refine(image, Region.parse(region))
        assert mask.shape == shape
        assert mask.any()


class Everything:
    """A refiner that takes all of the image for the object, after a moment."""

    def refine(self, image: np.ndarray, region: Region) -> np.ndarray:
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        time.sleep(0.5)
        return np.ones(image.shape[:2], np.bool_)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(refine, "_registered", [])
    monkeypatch.delenv("GARSERVE_REFINER", raising=False)
    refine._offered.cache_clear()
    yield
    refine._offered.cache_clear()


def test_another_refiner(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(refine.chosen(), GrabCut)
    with pytest.raises(TypeError, match=r"expected an object with refine\(image, region\), got int"):
        refine.register(3)  # type: ignore[arg-type]

    def offers(*names: str) -> None:
        found = [SimpleNamespace(name=name, load=lambda: Everything) for name in names]
        monkeypatch.setattr(refine, "entry_points", lambda group: found if group == "garserve.refiners" else [])
        refine._offered.cache_clear()

    offers("sam")
    assert isinstance(refine.chosen(), Everything)
    offers("sam", "other")
    with pytest.raises(RequestError, match=r"several refiners are installed \(other, sam\); GARSERVE_REFINER chooses"):
        refine.chosen()
    monkeypatch.setenv("GARSERVE_REFINER", "other")
    assert isinstance(refine.chosen(), Everything)
    monkeypatch.setenv("GARSERVE_REFINER", "grabcut")
    assert isinstance(refine.chosen(), GrabCut)
    monkeypatch.setenv("GARSERVE_REFINER", "none")
    with pytest.raises(RequestError, match=r"expected grabcut or one of \['other', 'sam'\], got 'none'"):
        refine.chosen()
    mine = Everything()
    refine.register(mine)
    assert refine.chosen() is mine


def png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with serving(make_app([])) as address:
        yield address


def post(base: str, body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(
        base + "v1/regions/refine", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_over_http(base: str) -> None:
    status, answer = post(base, {"image": png(scene()), "region": {"box": [115, 65, 250, 200]}})
    assert status == 200
    assert overlap(Region.parse(answer["region"]).mask(240, 320), DISC) > 0.9


def test_others_are_answered_meanwhile(base: str) -> None:
    refine.register(Everything())
    body = {"image": png(scene()), "region": {"box": [1, 1, 9, 9]}}
    answers: list[tuple[int, Any]] = []
    asking = [threading.Thread(target=lambda: answers.append(post(base, body))) for _ in range(3)]
    for thread in asking:
        thread.start()
    waits = []
    while any(thread.is_alive() for thread in asking):
        before = time.perf_counter()
        with urllib.request.urlopen(base + "v1/models", timeout=60) as answer:
            assert answer.status == 200
        waits.append(time.perf_counter() - before)
        time.sleep(0.02)
    assert [status for status, _ in answers] == [200] * 3
    assert len(waits) > 5
    assert sorted(waits)[len(waits) // 2] < 0.25  # a refiner sleeps twice as long


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "https://example.org/a.png"}, "fetches no images"),
        ({"image": "/etc/passwd"}, "expected data:"),
        ({"image": "data:image/png;base64,AAAA"}, "not an image"),
        ({"region": {"mask": "/etc/passwd"}}, "mask: expected a PNG"),
        ({"region": {"points": [[9, 9]] * 20_000}}, "at most 10000 points"),
        ({"region": {"box": [1, 2, 3]}}, "box: expected 4 numbers, got 3"),
        ({"region": {"box": [1000, 2, 2000, 9]}}, "outside the 320x240 image"),
        ({"region": {"points": [[9, 9]], "colour": 1}}, "points has no field 'colour'"),
    ],
)
def test_refusals(base: str, change: dict[str, Any], message: str) -> None:
    status, answer = post(base, {"image": png(scene()), "region": {"box": [1, 1, 9, 9]}, **change})
    assert status == 400
    assert message in answer["error"]["message"]


def test_what_a_refiner_does_wrong(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"image": png(scene()), "region": {"box": [1, 1, 9, 9]}}

    def too_small(image: np.ndarray, region: Region) -> np.ndarray:
        raise RegionError("box: too small")

    refine.register(SimpleNamespace(refine=too_small))
    status, answer = post(base, body)
    assert (status, answer["error"]["message"]) == (400, "box: too small")
    refine.register(SimpleNamespace(refine=lambda image, region: np.ones((2, 2), np.bool_)))
    status, answer = post(base, body)
    assert status == 500
    assert "mask" not in answer["error"]["message"]  # the inside is the log's
    monkeypatch.setattr(refine, "_registered", [])
    monkeypatch.setenv("GARSERVE_REFINER", "none")
    status, answer = post(base, body)
    assert status == 501
    assert "GARSERVE_REFINER" in answer["error"]["message"]
