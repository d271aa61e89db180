"""How many tiles go through the tower for N regions of an image: garserve's tile keys against all tiles every time.

`python benchmarks/tiles_computed.py REGIONS.jsonl` with lines {"image": path, "regions": [{"rle": …}, …]}. Counting
needs no model. The masks of all images are drawn at random, stretched to the image that they are put on.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Annotated

import numpy as np
import typer
from machine import save
from PIL import Image
from rich.console import Console
from rich.table import Table

from garserve.inputs.processor import draw_masks
from garserve.inputs.regions import Region
from garserve.inputs.shapes import Mask
from garserve.inputs.tiles import choose_grid, pack_mask, tile_mask

TILE = 448
COUNTS = (1, 5, 20, 50)
GROUP = 5  # regions of one request of several


def main(
    regions: Annotated[Path, typer.Argument(help="Photographs with masks, one JSON object a line.")],
    save_results: Annotated[
        bool, typer.Option("--save", help="Write benchmarks/results/.../tiles_computed.json.")
    ] = False,
) -> None:
    """Count tiles for 1, 5, 20 and 50 regions an image, by the most tiles an image is cut into."""
    sizes, masks = _read(regions)
    table = Table("most tiles", "regions", "all, every time", "touched", "computed", "share", "five together")
    figures = {}
    for most in (8, 16, 36):
        for count in COUNTS:
            rows = list(_count(sizes, masks, most, count))
            upstream, touched, computed, grouped = (mean(column) for column in zip(*rows, strict=True))
            shares = (touched / upstream, computed / upstream, grouped / upstream)
            figures[f"{most} tiles, {count} regions"] = dict(
                zip(("touched", "computed", "five together"), (round(share, 3) for share in shares), strict=True)
            )
            values = (upstream, touched, computed)
            table.add_row(str(most), str(count), *(f"{v:.1f}" for v in values), f"{shares[1]:.2f}", f"{shares[2]:.2f}")
    Console().print(table)
    if save_results:
        conditions = (
            "share of the tiles that are computed when every region encodes the whole image; "
            f"{len(sizes)} photographs, {len(masks)} real masks drawn at random, tiles of {TILE} "
            "pixels. touched: by a bound, the thumbnail and the tiles that the mask meets for each region, the others "
            "once. computed: distinct keys, regions asked one by one. five together: the same, five regions a request."
        )
        print(save("tiles_computed", figures, conditions))


def _read(path: Path) -> tuple[list[tuple[int, int]], list[Mask]]:
    """Return the sizes (height, width) of all photographs, and all masks."""
    sizes, masks = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        with Image.open(path.parent / row["image"]) as image:
            size = (image.height, image.width)
        sizes.append(size)
        masks += draw_masks([Region.parse(region) for region in row["regions"]], *size)
    return sizes, masks


def _count(
    sizes: list[tuple[int, int]], masks: list[Mask], most: int, count: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield for each photograph how many tiles: all for each region, the bound, distinct ones, those of groups."""
    rng = np.random.default_rng(0)
    for height, width in sizes:
        grid = choose_grid(width, height, most, TILE)
        tiles = 1 + grid[0] * grid[1]
        chosen = [_stretched(masks[int(i)], height, width) for i in rng.integers(len(masks), size=count)]
        touched = [_touched(mask, grid) for mask in chosen]
        untouched = set(range(1, tiles)) - set.intersection(*touched)
        bound = sum(1 + len(some) for some in touched) + len(untouched)
        groups = [np.logical_or.reduce(chosen[start : start + GROUP]) for start in range(0, count, GROUP)]
        yield count * tiles, bound, _distinct(chosen, grid), _distinct(groups, grid)


def _stretched(mask: Mask, height: int, width: int) -> Mask:
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def _touched(mask: Mask, grid: tuple[int, int]) -> set[int]:
    """Tiles whose part of the image holds a pixel of the mask, before it is resized."""
    rows, columns = np.nonzero(mask)
    down, across = rows * grid[1] // mask.shape[0], columns * grid[0] // mask.shape[1]
    return set(np.unique(1 + down * grid[0] + across).tolist())


def _distinct(masks: list[Mask], grid: tuple[int, int]) -> int:
    """Count different tiles of one image under several masks; the pixels differ from place to place."""
    keys = set()
    for mask in masks:
        packed = pack_mask(tile_mask(mask, grid, TILE)).numpy()
        keys |= {(place, tile.tobytes()) for place, tile in enumerate(packed)}
    return len(keys)


if __name__ == "__main__":
    typer.run(main)
