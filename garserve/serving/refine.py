"""POST /v1/regions/refine: a box, points, a scribble or an outline, made to the mask of the object that it marks.

GrabCut does it unless another refiner is there: one that was registered, or one that an installed package offers under
the entry point `garserve.refiners`. `GARSERVE_REFINER` names one of several.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray
from pycocotools import mask as coco
from pydantic import BaseModel, ConfigDict, Field

from garserve.errors import InputError, RequestError
from garserve.inputs.regions import Region
from garserve.inputs.shapes import Mask
from garserve.serving.answering import attended, deadline_in, read_body
from garserve.serving.errors import APIError
from garserve.serving.openapi import documented
from garserve.serving.regions import drawable, parse_regions
from garserve.serving.routes import Route
from garserve.serving.schemas import RegionJSON, Strict
from garserve.serving.service import Service, service

GROUP = "garserve.refiners"
# Two refinements at a time, and never in the threads that prepare answers.
_threads = ThreadPoolExecutor(2, thread_name_prefix="garserve-refine")


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
    """Return the refiner in use; RequestError where it is not clear which, or it is not there."""
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


class RefineRequest(Strict):
    """One image and one region of it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"image": "data:image/png;base64,iVBORw0KGgo…", "region": {"box": [320, 235, 412, 335]}}]
        },
    )
    image: str = Field(min_length=1, description="data:…, or what the operator allows of http(s):// and file://")
    region: RegionJSON


class Refined(BaseModel):
    """The object's mask, as a region that every other request takes."""

    region: RegionJSON = Field(description="COCO's RLE, compressed.")


router = APIRouter(route_class=Route)


@router.post(
    "/v1/regions/refine",
    **documented(RefineRequest, answer=Refined, summary="Refine a region to the mask of the object in it"),
)
async def refine_region(raw_request: Request) -> Response:
    """Find the object that a region marks; where none is found, the region is answered as it was drawn."""
    own = service(raw_request)
    body = await read_body(raw_request, RefineRequest)
    deadline = deadline_in(own.settings.request_seconds)
    return JSONResponse(await attended(raw_request, _refine(own, body), deadline))


async def _refine(own: Service, body: RefineRequest) -> dict[str, Any]:
    try:
        (region,) = parse_regions([body.region], own.settings.max_points)
        async with own.preparer.picture(body.image) as picture:
            loop = asyncio.get_running_loop()
            return {"region": await loop.run_in_executor(_threads, refined, picture.pixels, region)}
    except InputError as error:
        raise type(error)(str(error).replace("regions[0]: ", "region: ", 1)) from None


def refined(image: NDArray[np.uint8], region: Region | str) -> dict[str, Any]:
    """Return {"rle": …} of the object that a region marks in an image [H, W, 3].

    Raises InputError for what cannot be drawn, and APIError (501) where this server can refine nothing.
    """
    try:
        refiner = chosen()
    except RequestError as error:
        raise APIError(501, str(error), code="not_available") from None
    mask = refiner.refine(image, drawable(region, *image.shape[:2]))
    if mask.shape != image.shape[:2] or mask.dtype != np.bool_ or not mask.any():
        raise TypeError(f"refiner: expected a mask of booleans {list(image.shape[:2])}, got {mask.dtype} {mask.shape}")
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"rle": {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}}
