"""`POST /v1/regions/refine`: a box, points, a scribble or an outline, made to the object's own mask.

GrabCut does it unless another refiner is there: one that was registered, or one that an installed package offers under
the entry point `garserve.refiners`. `GARSERVE_REFINER` names one of several.
"""

import os
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import anyio
import numpy as np
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from garserve.errors import InputError, RegionError, RequestError
from garserve.inputs.images import load_image
from garserve.inputs.regions import Region
from garserve.inputs.shapes import Mask

GROUP = "garserve.refiners"
_AT_ONCE = 2  # refinements at a time: they compete with the decoding of images for the same cores
_MAX_PIXELS = 64_000_000


@runtime_checkable
class Refiner(Protocol):
    """What a segmenter of SAM's kind has to offer. It is called from several threads."""

    def refine(self, image: NDArray[np.uint8], region: Region) -> Mask:
        """Return the mask [H, W], boolean, of the object that `region` marks in `image`, uint8 RGB [H, W, 3].

        `region.shape` tells how it was marked (`BoxShape`, `StrokeShape` for points and scribbles, `PolygonShape`, …),
        and `region.mask(H, W)` draws it. An InputError is answered with 400 and its text.
        """


_registered: list[Refiner] = []


def register(refiner: Refiner) -> None:
    """Use a refiner for every request of this process from now on."""
    if not isinstance(refiner, Refiner):
        raise TypeError(f"refiner: expected an object with refine(image, region), got {type(refiner).__name__}")
    _registered[:] = [refiner]


def chosen() -> Refiner:
    """Return the refiner in use; RequestError where an entry point's name is not clear, or not there."""
    return _registered[0] if _registered else _offered(os.environ.get("GARSERVE_REFINER", ""))


@lru_cache(maxsize=4)
def _offered(name: str) -> Refiner:
    offers = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name == "grabcut" or not (offers or name):
        from garserve.serving.grabcut import GrabCut

        return GrabCut()
    if not name and len(offers) > 1:
        raise RequestError(
            f"refine: several refiners are installed ({', '.join(sorted(offers))}); GARSERVE_REFINER chooses"
        )
    if name and name not in offers:
        raise RequestError(f"refine: GARSERVE_REFINER: expected grabcut or one of {sorted(offers)}, got {name!r:.80}")
    made = offers[name or next(iter(offers))].load()()
    if not isinstance(made, Refiner):
        raise RequestError(f"refine: {GROUP}: expected an object with refine(image, region), got {type(made).__name__}")
    return made


class RefineRequest(BaseModel):
    """One image and one region of it."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{
        "image": "data:image/jpeg;base64,…", "region": {"box": [196, 228, 262, 310]},
    }]})  # fmt: skip

    image: str = Field(description="The image as a data URL.")
    region: dict[str, Any] = Field(
        description="A box, polygon, points, scribble or RLE, in pixels of the upright image."
    )


router = APIRouter()


@router.post("/v1/regions/refine", summary="Refine a region to the object's mask")
async def refine(request: RefineRequest) -> JSONResponse:
    """Answer `{"region": {"rle": {"size": [H, W], "counts": "…"}}}`: COCO's RLE of the object's mask."""
    try:
        async with _limit():
            region = await anyio.to_thread.run_sync(refined, request.image, request.region)
    except InputError as error:
        return JSONResponse({"error": {"message": str(error), "type": "BadRequestError", "code": 400}}, 400)
    return JSONResponse({"region": region})


@lru_cache(maxsize=1)
def _limit() -> anyio.Semaphore:
    return anyio.Semaphore(_AT_ONCE)


def refined(url: str, data: dict[str, Any]) -> dict[str, Any]:
    """Read the image, refine the region, and return `{"rle": …}`. Raises InputError; takes a thread of its own."""
    from pycocotools import mask as coco

    if not url.startswith("data:"):
        raise RequestError("image: expected a data URL")
    if "mask" in data:
        raise RegionError("region: mask: expected a box, polygon, points, scribble or rle")
    image = load_image(url, max_pixels=_MAX_PIXELS)
    mask = chosen().refine(image, Region.parse(data))
    if mask.shape != image.shape[:2] or mask.dtype != np.bool_ or not mask.any():
        raise RequestError(f"refine: the refiner gave no mask of the image's size: {mask.dtype} {list(mask.shape)}")
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"rle": {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}}
