"""The authors' preprocessing: every request resizes its photograph and its image of region numbers, in floats.

Done again for each region, as a transformers processor does: it knows nothing of the request before.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from garserve.config import GARConfig
from garserve.inputs.prompts import CURIOUS, DEFAULT_SYSTEM, DESCRIBE
from garserve.inputs.tiles import Grid, choose_grid

warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to it here
_SINGLE = 1  # the authors name the region of the single-region form <Prompt1>


@dataclass(frozen=True)
class Question:
    """What the authors' dataset class takes: an image, a mask for each prompt number, and a question about them.

    Without a question, the only region is described. `names` are the masks' prompt numbers in the order of the text,
    and `listed` which of them the text lists, where it is not all of them.
    """

    image: NDArray[np.uint8]  # [H, W, 3]
    masks: list[NDArray[np.bool_]]  # [H, W], in the order of `names`
    names: list[int]
    text: str | None = None
    listed: list[int] | None = None

    @classmethod
    def single(cls, image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> "Question":
        """The form for one region."""
        return cls(image, [mask], [_SINGLE])


@dataclass(frozen=True)
class Inputs:
    """What the model's generate takes: ids [L], pixels and region numbers [T, 3, S, S] in -1..1, boxes in 0..1."""

    ids: torch.Tensor
    pixels: torch.Tensor
    numbers: torch.Tensor
    boxes: list[tuple[float, ...]]
    names: list[int]
    grid: Grid


class UpstreamInputs:
    """The processor of one checkpoint."""

    def __init__(self, folder: Path, config: GARConfig, max_num_tiles: int | None = None) -> None:
        self.config = config
        self.max_num_tiles = max_num_tiles or config.max_num_tiles
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))

    def __call__(
        self, question: Question, *, boxes: list[tuple[float, ...]] | None = None, pixels: torch.Tensor | None = None
    ) -> Inputs:
        """Prepare one request; `boxes` where they are not those of the masks, `pixels` where they are known."""
        height, width = question.image.shape[:2]
        grid = choose_grid(width, height, self.max_num_tiles, self.config.tile_size)
        if pixels is None:
            pixels = self._tiles(torch.from_numpy(question.image).permute(2, 0, 1), grid, bicubic=True)
        numbers = self._tiles(self._numbers(question)[None].expand(3, -1, -1), grid, bicubic=False)
        listed = question.names if question.listed is None else question.listed
        boxes = boxes or [box_of(question.masks[question.names.index(name)]) for name in listed]
        return Inputs(self._ids(question, listed, len(pixels)), pixels, numbers, boxes, listed, grid)

    def _numbers(self, question: Question) -> torch.Tensor:
        """Each pixel's prompt number, the first region's where several cover it, and prompt_count where none does."""
        none = self.config.prompt_count
        numbers = np.full(question.image.shape[:2], none, dtype=np.uint8)
        for mask, name in zip(question.masks, question.names, strict=True):
            numbers[(numbers == none) & mask] = name
        return torch.from_numpy(numbers)

    def _tiles(self, picture: torch.Tensor, grid: Grid, *, bicubic: bool) -> torch.Tensor:
        """Thumbnail and tiles as floats [T, 3, S, S] in -1..1."""
        size, (across, down) = self.config.tile_size, grid
        thumbnail = _resized(picture, size, size, bicubic=bicubic)[None]
        canvas = _resized(picture, down * size, across * size, bicubic=bicubic)
        tiles = canvas.reshape(3, down, size, across, size).permute(1, 3, 0, 2, 4).reshape(-1, 3, size, size)
        return (torch.cat([thumbnail, tiles]) - 127.5) / 127.5

    def _ids(self, question: Question, names: list[int], tiles: int) -> torch.Tensor:
        """Render the text with every placeholder in it, and tokenise all of it."""
        cells = self.config.tokens_per_tile
        crops = {name: self.tokenizer.convert_ids_to_tokens(self.config.crop_token_ids[name]) * cells for name in names}
        if question.text is None:
            (name,) = names
            user = f"{CURIOUS}<Prompt{name}>;\n<Prompt{name}>: {crops[name]}{DESCRIBE}"
        else:
            listed = "".join(f"<Prompt{name}>; " for name in names)
            user = f"{CURIOUS}{listed}" + "".join(f"\n<Prompt{name}>: {crops[name]}" for name in names)
            user = f"{user}\n\n{question.text}".strip()
        image = self.tokenizer.convert_ids_to_tokens(self.config.image_token_id) * (cells * tiles)
        turns = (("system", DEFAULT_SYSTEM), ("user", image + user))
        text = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{said}<|eot_id|>" for role, said in turns)
        text = f"<|begin_of_text|>{text}<|start_header_id|>assistant<|end_header_id|>\n\n"
        return self.tokenizer(text, return_tensors="pt")["input_ids"][0]


def box_of(mask: NDArray[np.bool_]) -> tuple[float, ...]:
    """Inclusive pixel bounds over the image's sides, as the authors have them."""
    rows, columns = np.nonzero(mask)
    height, width = mask.shape
    return (
        float(columns.min() / width),
        float(rows.min() / height),
        float(columns.max() / width),
        float(rows.max() / height),
    )


def _resized(picture: torch.Tensor, height: int, width: int, *, bicubic: bool) -> torch.Tensor:
    size = (height, width)
    if not bicubic:
        return functional.interpolate(picture[None], size=size, mode="nearest")[0].float()
    resized = functional.interpolate(
        picture[None].float(), size=size, mode="bicubic", antialias=True, align_corners=False
    )
    return resized[0].clamp_(0, 255).round_()
