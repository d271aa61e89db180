"""How many tiles go through the tower for N regions of an image: garserve's tile keys against all tiles every time.

`python benchmarks/tiles_computed.py REGIONS.jsonl` with lines {"image": path, "regions": [{"rle": …}, …]}, read as
`garserve batch` reads them. Counting needs no model. Each image gets masks of all images, some of them mirrored, none
twice, stretched to its size.
"""

from pathlib import Path
from statistics import mean
from typing import Annotated

import numpy as np
import typer
from blake3 import blake3
from machine import save
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from garserve.bench.real import photographs
from garserve.errors import InputError
from garserve.inputs.shapes import Mask
from garserve.inputs.tiles import choose_grid, pack_mask, tile_mask

TILE = 448
MOST = (8, 16, 36)  # tiles an image is cut into at most: of GAR-8B, of GAR-1B, of the library
COUNTS = (1, 5, 20, 50)
MIRRORS = tuple((np.s_[::down], np.s_[::across]) for down in (1, -1) for across in (1, -1))
GROUP = 5  # regions of one request of several
Counted = tuple[int, int, int, int]
Key = tuple[int, bytes]


def main(
    regions: Annotated[Path, typer.Argument(help="Photographs with masks, one JSON object a line.")],
    save_results: Annotated[
        bool, typer.Option("--save", help="Write benchmarks/results/.../tiles_computed.json.")
    ] = False,
) -> None:
    """Count tiles for 1, 5, 20 and 50 regions an image, by the most tiles an image is cut into."""
    sizes, masks = _read(regions)
    columns = ("all", "touched", "computed", "touched/all", "computed/all", "by fives/all")
    table = Table("most tiles", "regions", *columns)
    figures = {}
    jobs = [(most, size) for most in MOST for size in sizes]
    counted: dict[tuple[int, int], list[Counted]] = {}
    for number, (most, size) in enumerate(track(jobs, "Counting", console=Console(stderr=True))):
        for count, one in zip(COUNTS, _count(size, masks, most, number % len(sizes)), strict=True):
            counted.setdefault((most, count), []).append(one)
    for (most, count), rows in counted.items():
        upstream, touched, computed, grouped = (mean(column) for column in zip(*rows, strict=True))
        shares = (touched / upstream, computed / upstream, grouped / upstream)
        figures[f"{most} tiles, {count} regions"] = dict(
            zip(("touched", "computed", "five together"), (round(share, 3) for share in shares), strict=True)
        )
        values = (f"{value:.1f}" for value in (upstream, touched, computed))
        table.add_row(str(most), str(count), *values, *(f"{share:.3f}" for share in shares))
    Console().print(table)
    if save_results:
        conditions = (
            "share of the tiles that are computed when every region encodes the whole image; "
            f"{len(sizes)} photographs, {len(masks)} real masks and their mirrors drawn without repetition, tiles of "
            f"{TILE} pixels. touched: by a bound, the thumbnail and the tiles that the mask meets for each region, the "
            "others once. computed: distinct keys, regions asked one by one. five together: the same, five regions a "
            "request."
        )
        print(save("tiles_computed", figures, conditions))


def _read(path: Path) -> tuple[list[tuple[int, int]], list[Mask]]:
    """Return the sizes (height, width) of all photographs, upright, and all masks.

    Raises SystemExit where a line cannot be used, or where masks are too few to be drawn without repetition.
    """
    sizes: list[tuple[int, int]] = []
    masks: list[Mask] = []
    try:
        for one in photographs(path):
            sizes.append((one.image.shape[0], one.image.shape[1]))
            masks += one.masks
    except InputError as error:
        raise SystemExit(str(error)) from None
    least = -(-max(COUNTS) // len(MIRRORS))
    if len(masks) < least:
        raise SystemExit(
            f"{path}: expected at least {least} regions, {max(COUNTS)} with their mirrors, got {len(masks)}: no figures"
        )
    return sizes, masks


def _count(size: tuple[int, int], masks: list[Mask], most: int, seed: int) -> list[Counted]:
    """Count tiles of one photograph, for each of COUNTS: all each time, the bound, distinct ones, those of groups."""
    height, width = size
    grid = choose_grid(width, height, most, TILE)
    tiles = 1 + grid[0] * grid[1]
    chosen = [_stretched(mask, height, width) for mask in _drawn(masks, max(COUNTS), seed)]
    touched, keys = [_touched(mask, grid) for mask in chosen], [_keys(mask, grid) for mask in chosen]
    results = []
    for count in COUNTS:
        untouched = set(range(1, tiles)) - set.intersection(*touched[:count])
        bound = sum(1 + len(some) for some in touched[:count]) + len(untouched)
        groups = [np.logical_or.reduce(chosen[start : min(start + GROUP, count)]) for start in range(0, count, GROUP)]
        together = set[Key]().union(*(_keys(mask, grid) for mask in groups))
        results.append((count * tiles, bound, len(set[Key]().union(*keys[:count])), len(together)))
    return results


def _drawn(masks: list[Mask], count: int, seed: int) -> list[Mask]:
    """Draw masks, each once as it is and once in each mirror."""
    mirrors = [mask[rows, columns] for mask in masks for rows, columns in MIRRORS]
    order = np.random.default_rng(seed).permutation(len(mirrors))[:count]
    return [mirrors[index] for index in order]


def _stretched(mask: Mask, height: int, width: int) -> Mask:
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def _touched(mask: Mask, grid: tuple[int, int]) -> set[int]:
    """Tiles whose part of the image holds a pixel of the mask, before it is resized."""
    rows, columns = (np.arange(count) * side // count for count, side in zip(grid[::-1], mask.shape, strict=True))
    held = np.logical_or.reduceat(np.logical_or.reduceat(mask, rows, axis=0), columns, axis=1)
    return set((1 + np.flatnonzero(held)).tolist())


def _keys(mask: Mask, grid: tuple[int, int]) -> set[Key]:
    """What tells the tiles of one image apart under different masks: their place, and the mask as the tower sees it."""
    packed = pack_mask(tile_mask(mask, grid, TILE)).numpy()
    return {(place, blake3(tile.data).digest(16)) for place, tile in enumerate(packed)}


if __name__ == "__main__":
    typer.run(main)
