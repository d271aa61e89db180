"""One golden case as it lies on disk, and one finding about it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from garserve.config import BoxScale
from garserve.inputs.images import load_image
from garserve.inputs.processor import PreparedRequest, Processor, draw_masks
from garserve.inputs.regions import normalised_box
from garserve.inputs.request import RegionRequest
from garserve.inputs.tokenizer import PROMPT_NAME

SCALES: tuple[BoxScale, BoxScale] = ("released", "geometric")


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: an error measured against a limit."""

    case: str
    check: str
    error: float
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """True where the error is within the limit; NaN never is."""
        return self.error <= self.limit

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        figures = f"error {self.error:<9.3g} limit {self.limit:<7.3g}"
        return f"{verdict} {self.case:<36} {self.check:<28} {figures} {self.note}".rstrip()


@dataclass(frozen=True)
class Case:
    """A golden case: its description, its arrays, and the folder that it lies in."""

    folder: Path
    data: dict[str, Any]
    arrays: dict[str, torch.Tensor]

    @classmethod
    def read(cls, path: Path) -> "Case":
        """Read `<name>.json` and `<name>.safetensors`."""
        return cls(
            path.parent, json.loads(path.read_text(encoding="utf-8")), load_file(path.with_suffix(".safetensors"))
        )

    @property
    def name(self) -> str:
        """The case's own name."""
        return str(self.data["name"])

    @property
    def raw(self) -> bool:
        """True where two quirks of the authors' demo are kept: one box for all regions, and a shuffled order."""
        return self.data["upstream_behaviour"] == "raw"

    def request(self) -> RegionRequest:
        """Return the case as a request of a user's."""
        regions = self.data["regions"]
        single = self.data["mode"] == "single"
        order = [int(PROMPT_NAME.findall(str(name))[0]) if "<" in str(name) else int(name) for name in self._order()]
        return RegionRequest(
            image=self.folder / self.data["image"]["file"],
            regions=[{"rle": region["rle"]} for region in regions],
            question=None if single else self.data["question"],
            prompt_index=regions[0]["prompt_index"] if single else None,
            focus=order or None,
            max_tokens=len(self.arrays["tokens_released"]),
        )

    def prepare(self, processor: Processor, scale: BoxScale) -> PreparedRequest:
        """Prepare the request by garserve's own road; of a raw case, the boxes are the file's."""
        tuned = processor.variant(max_num_tiles=self.data["max_num_tiles"], box_scale=scale)
        request = self.request()
        if not self.raw:
            return tuned(request)
        request.check(processor.config.prompt_count)
        image = load_image(self.folder / self.data["image"]["file"])
        masks = draw_masks(request.parsed_regions(), *image.shape[:2])
        return tuned.prepare(request, image, masks, [tuple(region["bbox"]) for region in self.data["regions"]])

    def own_boxes(self) -> np.ndarray:
        """Return the normalised boxes [R, 4] of the case's masks by garserve's rule."""
        image = load_image(self.folder / self.data["image"]["file"])
        masks = draw_masks(self.request().parsed_regions(), *image.shape[:2])
        return np.asarray([normalised_box(mask) for mask in masks])

    def _order(self) -> list[Any]:
        return list(self.data.get("prompt_order_in_text", [])) if self.raw else []


def relative_error(ours: torch.Tensor, golden: torch.Tensor) -> float:
    """Return the largest difference over the largest golden value; infinite where shapes differ."""
    if ours.shape != golden.shape:
        return float("inf")
    return float((ours.double() - golden.double()).abs().max() / golden.double().abs().max().clamp(min=1e-12))


def largest_difference(ours: torch.Tensor, golden: torch.Tensor) -> float:
    """Return the largest absolute difference; infinite where shapes differ."""
    if ours.shape != golden.shape:
        return float("inf")
    return float((ours.double() - golden.double()).abs().max()) if golden.numel() else 0.0


def count_different(ours: torch.Tensor, golden: torch.Tensor) -> float:
    """Return how many elements differ; infinite where shapes differ."""
    return float((ours != golden).sum()) if ours.shape == golden.shape else float("inf")
