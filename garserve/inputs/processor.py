"""A request made ready for a model: token ids, and for each run of placeholders the tiles that it is computed from."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from threading import Lock
from weakref import ref as weakref

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray

from garserve.config import BoxScale, GARConfig
from garserve.errors import InputError, RequestError
from garserve.inputs.encoded import EncodedImage
from garserve.inputs.images import load_image
from garserve.inputs.prompts import Span, assemble
from garserve.inputs.regions import Region, normalised_box
from garserve.inputs.request import RegionRequest
from garserve.inputs.roi import RoI, replay_roi
from garserve.inputs.shapes import Box, Mask
from garserve.inputs.tiles import TiledImage, pack_mask, tile_image, tile_mask
from garserve.inputs.tokenizer import GARTokenizer
from garserve.tracing import span

KEY_BYTES = 16


@dataclass(frozen=True)
class Item:
    """One run of placeholders and what its embeddings depend on.

    An image item holds all tiles of the image, thumbnail first, and gives n² tokens for each. A region item holds
    the few tiles that its RoI reads, and gives n² tokens in all. `hash` covers all of this.
    """

    tiles: torch.Tensor  # uint8 [T, 3, S, S]
    masks: torch.Tensor  # uint8 [T, S, ceil(S/8)]: bits of the union of the request's regions
    keys: tuple[bytes, ...]  # one per tile, over its pixels and its mask
    roi: RoI | None
    hash: str
    rows: torch.Tensor | None = None  # [tokens, C] where they were computed elsewhere; there are no tiles then


@dataclass(frozen=True)
class PreparedRequest:
    """A request as a model reads it: placeholders of `items[i]` lie at `spans[i]` of `token_ids`."""

    token_ids: list[int]
    items: list[Item]
    spans: list[Span]
    boxes: list[Box]  # normalised, of all regions


@dataclass(frozen=True)
class _Pixels:
    image: TiledImage
    digests: tuple[bytes, ...]


class _Names:
    """Names of images by their pixels; one that cannot change is read once, however often it is asked for."""

    _MOST = 64

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[weakref[NDArray[np.uint8]], bytes]] = {}

    def __call__(self, image: NDArray[np.uint8], max_num_tiles: int) -> bytes:
        """Return the name of an image [H, W, 3] that is cut into so many tiles at most."""
        place = (id(image), max_num_tiles)
        held = self._known.get(place)
        if held is not None and held[0]() is image and not image.flags.writeable:
            return held[1]
        shape = np.asarray(image.shape, dtype=np.int64)
        name = blake3(shape.tobytes() + bytes([max_num_tiles])).update(np.ascontiguousarray(image).data).digest()
        if not image.flags.writeable and image.base is None:
            if len(self._known) >= self._MOST:
                self._known.clear()
            self._known[place] = (weakref(image), name)
        return name


class Processor:
    """Turns requests into PreparedRequests for one checkpoint; safe to use from several threads."""

    def __init__(
        self,
        folder: Path,
        config: GARConfig,
        *,
        max_num_tiles: int | None = None,
        kept_images: int = 8,
        fingerprint: Callable[[], str] | None = None,
    ) -> None:
        """Read the tokenizer; `kept_images` most recent images stay tiled, so that their next request is cheap.

        `fingerprint` tells that of the checkpoint's vision half when an encoded image is to be held against it.
        Raises RequestError for a `max_num_tiles` that is no int of 1 to 36.
        """
        if max_num_tiles is not None:
            _check_tiles(max_num_tiles)
        self.config = config
        self.max_num_tiles = max_num_tiles or config.max_num_tiles
        self.tokenizer = GARTokenizer(folder / "tokenizer.json", config)
        self._kept: OrderedDict[bytes, Future[_Pixels]] = OrderedDict()
        self._kept_images = kept_images
        self._fingerprint = fingerprint
        self._lock = Lock()
        self._names = _Names()

    def variant(self, *, max_num_tiles: int | None = None, box_scale: BoxScale | None = None) -> "Processor":
        """Return a processor for the same checkpoint with other tiling or the other definition of the box."""
        twin = copy(self)
        twin._kept = OrderedDict()
        twin._names = _Names()
        twin.max_num_tiles = max_num_tiles or self.max_num_tiles
        if box_scale is not None:
            twin.config = replace(self.config, replay_box_scale=box_scale)
        return twin

    def __call__(self, request: RegionRequest) -> PreparedRequest:
        """Check a request, read its image, draw its regions, and lay out prompt and items.

        Raises an InputError that names the field where anything about the request cannot be used.
        """
        with span("preprocess"):
            return self._read(request)

    def _read(self, request: RegionRequest) -> PreparedRequest:
        if isinstance(request.image, EncodedImage):
            request.check(self.config.prompt_count)
            return self._encoded(request, request.image)
        regions = request.parsed_regions()
        request.check(self.config.prompt_count)
        with span("read image"):
            image = load_image(request.image)
        with span("draw masks"):
            masks = draw_masks(regions, image.shape[0], image.shape[1])
            boxes = [normalised_box(mask) for mask in masks]
        return self.prepare(request, image, masks, boxes)

    def prepare(
        self, request: RegionRequest, image: NDArray[np.uint8], masks: Sequence[Mask], boxes: Sequence[Box]
    ) -> PreparedRequest:
        """Lay out a checked request of which image [H, W, 3], masks [H, W] and normalised boxes are at hand."""
        listed = request.listed()
        items = self.items(image, masks, [boxes[position] for position in listed])
        with span("assemble prompt"):
            prompt = assemble(request, len(items[0].tiles), self.tokenizer, self.config)
        return PreparedRequest(prompt.token_ids, items, [prompt.image_span, *prompt.region_spans], list(boxes))

    def all_items(self, request: RegionRequest) -> list[Item]:
        """Return the image's item and one for every region, whichever of them the request lists. Raises InputError."""
        if isinstance(request.image, EncodedImage):
            raise RequestError("image: is encoded already")
        regions = request.parsed_regions()
        request.check(self.config.prompt_count)
        image = load_image(request.image)
        masks = draw_masks(regions, image.shape[0], image.shape[1])
        return self.items(image, masks, [normalised_box(mask) for mask in masks])

    def _encoded(self, request: RegionRequest, encoded: EncodedImage) -> PreparedRequest:
        """Lay out a request whose embeddings are at hand; their values name the items."""
        if self._fingerprint is None:
            raise RequestError("image: encoded images are taken by an engine of garserve.load only")
        encoded.check(self.config, self._fingerprint())
        items = [self._rows_item(rows) for rows in (encoded.image, *(encoded.regions[k] for k in request.listed()))]
        tiles = len(encoded.image) // self.config.tokens_per_tile
        prompt = assemble(request, tiles, self.tokenizer, self.config)
        return PreparedRequest(prompt.token_ids, items, [prompt.image_span, *prompt.region_spans], [])

    def _rows_item(self, rows: torch.Tensor) -> Item:
        side = self.config.tile_size
        none = torch.empty(0, 3, side, side, dtype=torch.uint8), torch.empty(0, side, -(-side // 8), dtype=torch.uint8)
        rows = rows.contiguous()
        digest = blake3(f"rows {rows.dtype} {list(rows.shape)}".encode())
        digest.update(rows.flatten().view(torch.uint8).numpy().data)
        return Item(*none, (), None, digest.hexdigest(32), rows.to(getattr(torch, self.config.dtype)))

    def items(self, image: NDArray[np.uint8], masks: Sequence[Mask], boxes: Sequence[Box]) -> list[Item]:
        """Return the image's item, marked with the union of all masks, and one region item for each box."""
        with span("tile image"):
            pixels = self._tiled(image)
        with span("tile masks"):
            return self._marked(pixels, masks, boxes)

    def _marked(self, pixels: _Pixels, masks: Sequence[Mask], boxes: Sequence[Box]) -> list[Item]:
        tiles, grid = pixels.image.tiles, pixels.image.grid
        packed = pack_mask(tile_mask(reduce(np.logical_or, masks), grid, self.config.tile_size))
        keys = tuple(
            blake3(digest + mask.tobytes()).digest(KEY_BYTES)
            for digest, mask in zip(pixels.digests, packed.numpy(), strict=True)
        )
        items = [make_item(tiles, packed, keys, None)]
        for box in boxes:
            roi = replay_roi(box, grid, self.config)
            chosen = roi.window.tile_indices(grid)
            items.append(make_item(tiles[chosen], packed[chosen], tuple(keys[i] for i in chosen), roi))
        return items

    def _tiled(self, image: NDArray[np.uint8]) -> _Pixels:
        """Return an image's tiles; who asks for those that another thread is making waits for them."""
        key, made = self._names(image, self.max_num_tiles), Future[_Pixels]()
        try:
            with self._lock:
                kept = self._kept.setdefault(key, made)
                self._kept.move_to_end(key)
                while len(self._kept) > self._kept_images:
                    self._kept.popitem(last=False)
            if kept is made:
                tiled = tile_image(image, self.max_num_tiles, self.config.tile_size)
                made.set_result(_Pixels(tiled, tuple(blake3(tile.data).digest() for tile in tiled.tiles.numpy())))
        except BaseException as error:
            with self._lock:
                if self._kept.get(key) is made:
                    del self._kept[key]
            made.set_exception(error)
            raise
        return kept.result()


def _check_tiles(most: object) -> None:
    if type(most) is not int:
        raise RequestError(f"max_num_tiles: expected a whole number of 1 to 36, got {most!r:.80}")
    if not 1 <= most <= 36:
        raise RequestError(f"max_num_tiles: expected 1 to 36, got {most}")


def draw_masks(regions: Sequence[Region], height: int, width: int) -> list[Mask]:
    """Draw each region on an image of this size; an error names the region's position."""
    masks = []
    for position, region in enumerate(regions):
        try:
            masks.append(region.mask(height, width))
        except InputError as error:
            raise type(error)(f"regions[{position}]: {error}") from None
    return masks


def make_item(tiles: torch.Tensor, masks: torch.Tensor, keys: tuple[bytes, ...], roi: RoI | None) -> Item:
    """Make an item and its hash, which covers tiles, masks and what the replay reads."""
    window = roi.window if roi else None
    numbers = np.asarray(roi.box if roi else (), dtype=np.float32).tobytes()
    places = (*roi.grid, window.top, window.bottom, window.left, window.right) if roi and window else ()
    digest = blake3(b"region" if roi else b"image")
    digest.update(numbers).update(np.asarray(places, dtype=np.int64).tobytes()).update(b"".join(keys))
    return Item(tiles, masks, keys, roi, digest.hexdigest(32))
