"""From a bundle of records to a parcel of prepared requests: all that is done before the engine, in workers or here."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from garserve.batch.bundles import Bundle
from garserve.batch.grouping import GAP, LARGEST_GROUP, Drawn, group_records, is_groupable, renamed
from garserve.batch.parcel import Entry, Parcel, Rows
from garserve.batch.record import ImageRef, Member, Record
from garserve.checkpoint import Checkpoint
from garserve.config import BoxScale, read_config
from garserve.errors import ImageError, InputError, RequestError
from garserve.inputs.encoded import SUFFIX, EncodedImage
from garserve.inputs.images import hold_image
from garserve.inputs.processor import PreparedRequest, Processor, draw_masks
from garserve.inputs.regions import Region, normalised_box
from garserve.inputs.request import RegionRequest, Turn
from garserve.inputs.shapes import Mask
from garserve.inputs.tokenizer import PROMPT_NAME


@dataclass(frozen=True)
class Preparation:
    """How records become requests. `question`, `system`, `max_tokens` and `temperature` are for records without them.

    With `group` > 1, up to so many records that ask about one region each are asked in the model's form for several
    regions: one mask of all of them, and each question about its own. Their boxes lie at least `group_gap` of the
    image's width or height apart.
    """

    folder: str  # of the checkpoint
    max_num_tiles: int | None = None
    box_scale: BoxScale | None = None
    group: int = 1
    group_gap: float = GAP
    question: str | None = None
    system: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.group <= LARGEST_GROUP:
            raise RequestError(f"--group: expected 1 to {LARGEST_GROUP}, got {self.group}")
        if not 0 <= self.group_gap <= 1:
            raise RequestError(f"--group-gap: expected 0 to 1, got {self.group_gap}")
        if self.question is not None and any(named[0] != "<Prompt0>" for named in PROMPT_NAME.finditer(self.question)):
            raise RequestError(f"--question: the one region of a record is <Prompt0>, got {self.question!r:.80}")
        _check_defaults(self)

    def processor(self) -> Processor:
        """Read the checkpoint's processor; its weights are read only where an encoded image is held against them."""
        folder = Path(self.folder)
        config = read_config(folder)
        if self.box_scale is not None:
            config = config.with_box_scale(self.box_scale)

        @cache
        def fingerprint() -> str:
            from garserve.model.fingerprint import vision_fingerprint

            return vision_fingerprint(Checkpoint.open(folder))

        return Processor(folder, config, max_num_tiles=self.max_num_tiles, fingerprint=fingerprint)


def _check_defaults(how: Preparation) -> None:
    """Check what records are asked with that say nothing else; RequestError names the option."""
    names = ("question", "system", "max_tokens", "temperature")
    options = {name: getattr(how, name) for name in names}
    try:
        RegionRequest("", [None], check_names=False, **options).check(prompt_count=1)
    except RequestError as error:
        name, told = str(error).split(":", 1)
        raise RequestError(f"--{name.replace('_', '-')}:{told}") from None


class Preparer:
    """Prepares bundles for one checkpoint."""

    def __init__(self, preparation: Preparation) -> None:
        self._how = preparation

    @cached_property
    def _processor(self) -> Processor:
        return self._how.processor()

    def __call__(self, bundle: Bundle) -> Parcel:
        """Prepare what is wanted of a bundle; whatever is wrong with a record becomes its error."""
        start = time.perf_counter()
        errors: dict[int, str] = {}
        drawn: list[Drawn] = []
        entries: list[Entry] = []
        tiles = np.zeros((0, 3, self._processor.config.tile_size, self._processor.config.tile_size), np.uint8)
        image: NDArray[np.uint8] | None = None
        for position, record in enumerate(bundle.records):
            if record.error is not None:
                errors[position] = record.error
                continue
            with _noted(errors, position):
                if isinstance(record.image, str) and record.image.endswith(SUFFIX):
                    entries += [self._encoded(position, record)] if bundle.wanted[position] else []
                    continue
                image = _image(record) if image is None else image
                _check_size(record, image)
                drawn.append(self._draw(position, record, image))
        size = min(self._how.group, self._processor.config.prompt_count) if drawn else 1
        for group in group_records(drawn, size, self._how.group_gap):
            if image is not None and any(bundle.wanted[one.position] for one in group):
                found, made = self._entries(group, image, errors)
                entries += [entry for entry in found if bundle.wanted[entry.record]]
                tiles = tiles if made is None else made
        wanted = {position for position, flag in enumerate(bundle.wanted) if flag}
        regions = {one.position: [encoded(mask) for mask in one.masks] for one in drawn if one.position in wanted}
        errors = {position: error for position, error in errors.items() if position in wanted}
        return Parcel(tiles, entries, errors, regions, time.perf_counter() - start)

    def _encoded(self, position: int, record: Record) -> Entry:
        """Prepare a record whose image and regions `garserve encode` has computed already."""
        image = EncodedImage.load(str(record.image))
        if len(image.regions) > 1 and record.options.get("question") is None:
            raise RequestError(
                f"image: was encoded with {len(image.regions)} regions, which are only asked about together; expected "
                "a question, or a file of one region to describe it"
            )
        request = self._request(record, image)
        prepared = self._processor(request)
        return _entry(position, request, prepared, prepared.items[0].masks.numpy(), _form(request))

    def _draw(self, position: int, record: Record, image: NDArray[np.uint8]) -> Drawn:
        request = self._request(record, image)
        request = replace(request, regions=request.parsed_regions())
        request.check(self._processor.config.prompt_count)
        masks = draw_masks(request.parsed_regions(), image.shape[0], image.shape[1])
        return Drawn(position, record.key, request, masks, [normalised_box(mask) for mask in masks])

    def _request(self, record: Record, image: NDArray[np.uint8] | EncodedImage) -> RegionRequest:
        options = dict(record.options)
        question = options.pop("question", None)
        count = len(image.regions) if isinstance(image, EncodedImage) else len(record.regions)
        if question is None and count == 1:
            question = self._how.question
        return RegionRequest(
            image=image,
            regions=[Region.parse(region) for region in record.regions],
            question=question,
            system=options.pop("system", self._how.system),
            max_tokens=options.pop("max_tokens", self._how.max_tokens),
            temperature=options.pop("temperature", self._how.temperature),
            turns=tuple(Turn(role, text) for role, text in options.pop("turns", ())),
            **options,
        )

    def _entries(
        self, group: list[Drawn], image: NDArray[np.uint8], errors: dict[int, str]
    ) -> tuple[list[Entry], NDArray[np.uint8] | None]:
        """Return entries, and the image's tiles where there are any; what cannot be prepared goes to `errors`."""
        grouped = self._how.group > 1 and is_groupable(group[0].request)
        masks = [mask for one in group for mask in one.masks]
        boxes = [box for one in group for box in one.boxes]
        entries: list[Entry] = []
        tiles: NDArray[np.uint8] | None = None
        shared: NDArray[np.uint8] | None = None
        for number, one in enumerate(group):
            request = one.request
            form = _form(request)
            if grouped:
                regions = [region for member in group for region in member.request.regions]
                request = replace(request, regions=regions, question=renamed(request.question, number), focus=[number])
                form = f"group of {len(group)}"
            with _noted(errors, one.position):
                prepared = self._processor.prepare(request, image, masks, boxes)
                shared = prepared.items[0].masks.numpy() if shared is None else shared
                entry = _entry(one.position, request, prepared, shared, form)
                entries.append(replace(entry, group=[member.id for member in group]) if grouped else entry)
                tiles = prepared.items[0].tiles.numpy()
        return entries, tiles


@contextmanager
def _noted(errors: dict[int, str], position: int) -> Iterator[None]:
    """Make what is wrong with a record, whatever it is, the error of its position: the others go on."""
    try:
        yield
    except MemoryError:
        errors[position] = "out of memory while it was prepared"
    except InputError as error:
        errors[position] = str(error)
    except Exception as error:
        errors[position] = f"request cannot be prepared ({type(error).__name__}: {error})"


def _form(request: RegionRequest) -> str:
    return "single" if request.question is None else "several"


def _entry(
    position: int, request: RegionRequest, prepared: PreparedRequest, masks: NDArray[np.uint8], form: str
) -> Entry:
    rois = [
        {"box": roi.box, "grid": roi.grid, "window": [window.top, window.bottom, window.left, window.right]}
        for item in prepared.items
        if (roi := item.roi) is not None and (window := roi.window) is not None
    ]
    return Entry(
        record=position,
        token_ids=np.asarray(prepared.token_ids, np.int32),
        masks=masks,
        keys=b"".join(prepared.items[0].keys),
        rois=rois,
        spans=[list(span) for span in prepared.spans],
        boxes=[list(box) for box in prepared.boxes],
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        seed=request.seed,
        form=form,
        rows=tuple(Rows.of(item) for item in prepared.items if item.rows is not None),
    )


def _image(record: Record) -> NDArray[np.uint8]:
    try:
        return hold_image(image_content(record.image))
    except ImageError as error:
        name = record.image_name
        raise ImageError(str(error).replace("image bytes", name, 1) if name else str(error)) from None


def _check_size(record: Record, image: NDArray[np.uint8]) -> None:
    """Check that an image [H, W, 3] is as large as its source says: regions drawn on another one lie elsewhere."""
    height, width = image.shape[:2]
    if record.size is not None and tuple(record.size) != (width, height):
        said = "x".join(map(str, record.size))
        raise ImageError(f"image {record.image_name}: the file says {said}, the upright image is {width}x{height}")


def image_content(image: ImageRef) -> str | bytes:
    """Return what hold_image takes: a path, a data URL, or bytes; ImageError where a member cannot be read."""
    if not isinstance(image, Member):
        return image
    try:
        with open(image.path, "rb") as file:
            file.seek(image.offset)
            return file.read(image.size)
    except OSError as error:
        raise ImageError(f"{image.path}: {image.name}: cannot be read ({error.strerror})") from None


def encoded(mask: Mask) -> dict[str, Any]:
    """Return a mask [H, W] as a compressed COCO RLE."""
    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
