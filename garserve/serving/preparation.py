"""From what a client sent to what the engine takes, in threads: the event loop answers others meanwhile."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from garserve.errors import ImageError, InputError, RequestError
from garserve.inputs.images import hold_image, image_pixels, load_with_alpha
from garserve.inputs.processor import PreparedRequest, Processor
from garserve.inputs.regions import Region
from garserve.inputs.request import RegionRequest
from garserve.serving import metrics
from garserve.serving.admission import PixelBudget
from garserve.serving.errors import too_large
from garserve.serving.fetch import Fetcher
from garserve.serving.files import read_file
from garserve.serving.regions import drawable, parse_regions
from garserve.serving.settings import Settings

_T = TypeVar("_T")


@dataclass(frozen=True)
class Picture:
    """A decoded image [H, W, 3], read-only, and the region that its alpha marks, where it was asked for and is one."""

    pixels: NDArray[np.uint8]
    alpha: Region | None = None


class Preparer:
    """Reads images, checks and draws regions, and makes prompts, with a few threads of its own."""

    def __init__(self, processor: Processor, settings: Settings, *, fetcher: Fetcher | None = None) -> None:
        self.processor, self.settings = processor, settings
        threads = settings.prepare_threads or min(max((os.cpu_count() or 2) // 2, 2), 8)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="garserve-prepare")
        self._budget = PixelBudget(settings.max_pixels_in_work)
        self._fetcher = fetcher
        if fetcher is None and settings.image_hosts:
            self._fetcher = Fetcher(
                settings.image_hosts, max_bytes=settings.max_image_bytes, seconds=settings.fetch_seconds
            )

    async def run(self, function: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
        """Call a function in one of the threads, and count its seconds as preparation."""
        metrics.waiting.inc()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, partial(_timed, function, *arguments, **options))
        finally:
            metrics.waiting.dec()

    @asynccontextmanager
    async def picture(self, url: str, *, alpha: bool = False) -> AsyncIterator[Picture]:
        """Read and decode an image, and have room for it meanwhile; `alpha` asks for the region that its alpha marks.

        Waits where too many pixels are in work. Raises APIError or ImageError where the image may not or cannot be
        read, before decoding where it is too large.
        """
        source = await self._source(url)
        pixels = await self.run(image_pixels, source, max_pixels=self.settings.max_pixels)
        async with self._budget.room(pixels):
            yield await self.run(_decode, source, alpha, self.settings.max_pixels)

    async def _source(self, url: str) -> str | bytes:
        source: str | bytes = url
        scheme, colon, _ = url[:8].partition(":")
        scheme = scheme.lower() if colon else ""
        if scheme == "data":
            source = f"data{url[4:]}"
            most = self.settings.max_image_bytes
            if len(url) * 3 // 4 > most + 200:
                raise too_large(f"image_url: more than {most} bytes", param="image_url")
        elif scheme in ("http", "https"):
            if self._fetcher is None:
                raise ImageError("image_url: this server fetches no images; send a data URL")
            source = await self._fetcher(url)
        elif scheme == "file":
            source = await self.run(read_file, url, self.settings.image_folder, self.settings.max_image_bytes)
        else:
            raise ImageError(f"image_url: expected data:…, http(s):// or file://, got {url!r:.60}")
        return source

    def regions(self, given: Sequence[Any] | None, picture: Picture, most: int) -> list[Region | str]:
        """Return the regions of a request, or the alpha channel's one where none are given.

        Raises an InputError that names the field.
        """
        if given is None:
            if picture.alpha is None:
                raise RequestError("regions: missing; give regions, or an image that is fully transparent outside one")
            return [picture.alpha]
        check_count(given, most)
        return parse_regions(given, self.settings.max_points)

    def prepare(self, picture: Picture, regions: Sequence[Region | str], **fields: Any) -> PreparedRequest:
        """Draw regions and lay out a request; to be called by `run`. Raises InputError."""
        height, width = picture.pixels.shape[:2]
        shapes = []
        for position, region in enumerate(regions):
            try:
                shapes.append(drawable(region, height, width))
            except InputError as error:
                raise type(error)(f"regions[{position}]: {error}") from None
        return self.processor(RegionRequest(picture.pixels, shapes, **fields))

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def check_count(given: Sequence[Any], most: int) -> None:
    """Check the number of regions, before any of them is looked at. Raises RequestError."""
    if not 1 <= len(given) <= most:
        raise RequestError(f"regions: expected 1 to {most}, got {len(given)}")


def _decode(source: str | bytes, alpha: bool, max_pixels: int) -> Picture:
    if not alpha:
        return Picture(hold_image(source, max_pixels=max_pixels))
    pixels, mask = load_with_alpha(source, max_pixels=max_pixels)
    pixels.setflags(write=False)  # it is not hashed again for each region
    return Picture(pixels, None if mask is None else Region.from_mask(mask))


def _timed(function: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    started = time.perf_counter()
    try:
        return function(*arguments, **options)
    finally:
        metrics.preprocess_seconds.observe(time.perf_counter() - started)
