"""Tiling: grids within bounds, cut and put together again without loss, masks cut like their images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from garserve.inputs.tiles import choose_grid, pack_mask, resize_bicubic, resize_nearest, tile_image, tile_mask

S = 56


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 30_000), height=st.integers(1, 30_000), tiles=st.integers(1, 36))
def test_grid_is_within_bounds_and_upright(width: int, height: int, tiles: int) -> None:
    across, down = choose_grid(width, height, tiles, 448)
    assert 1 <= across * down <= tiles
    if width > height:
        assert across >= down or tiles < 2 or across * 448 >= width
    holds = any(448 * a >= width and 448 * d >= height for a in range(1, tiles + 1) for d in range(1, tiles // a + 1))
    if holds and tiles > 1:
        assert 448 * across >= width
        assert 448 * down >= height


@pytest.mark.parametrize(
    ("size", "tiles", "grid"),
    [
        ((448, 448), 16, (4, 4)),
        ((2304, 1536), 16, (3, 2)),
        ((1, 1), 16, (4, 4)),
        ((20000, 20), 16, (16, 1)),
        ((9, 9), 1, (1, 1)),
    ],
)
def test_known_grids(size: tuple[int, int], tiles: int, grid: tuple[int, int]) -> None:
    assert choose_grid(*size, tiles, 448) == grid


@pytest.mark.parametrize("tiles", [0, 37])
def test_tile_count_is_bounded(tiles: int) -> None:
    with pytest.raises(ValueError, match="1 to 36"):
        choose_grid(10, 10, tiles, 448)


def test_tiles_are_the_canvas_cut_row_by_row(picture: np.ndarray) -> None:
    tiled = tile_image(picture, 6, S)
    across, down = tiled.grid
    assert tiled.tiles.shape == (1 + across * down, 3, S, S)
    assert tiled.tiles.dtype == torch.uint8
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    canvas = resize_bicubic(pixels, down * S, across * S)
    for row in range(down):
        for column in range(across):
            tile = tiled.tiles[1 + row * across + column]
            assert torch.equal(tile, canvas[:, row * S : (row + 1) * S, column * S : (column + 1) * S])
    assert torch.equal(tiled.tiles[0], resize_bicubic(pixels, S, S))


def test_read_only_input_is_copied_not_warned_about(picture: np.ndarray) -> None:
    frozen = picture.copy()
    frozen.flags.writeable = False
    assert torch.equal(tile_image(frozen, 4, S).tiles, tile_image(picture, 4, S).tiles)


def test_masks_are_cut_like_images(picture: np.ndarray) -> None:
    mask = np.zeros(picture.shape[:2], bool)
    mask[20:50, 30:90] = True
    grid = tile_image(picture, 6, S).grid
    tiles = tile_mask(mask, grid, S)
    whole = resize_nearest(torch.from_numpy(mask), grid[1] * S, grid[0] * S)
    joined = tiles[1:].reshape(grid[1], grid[0], S, S).transpose(1, 2).reshape(grid[1] * S, grid[0] * S)
    assert torch.equal(joined, whole)
    assert np.array_equal(np.unpackbits(pack_mask(tiles).numpy(), axis=-1)[..., :S].astype(bool), tiles.numpy())


def test_packing_of_sizes_that_are_no_multiple_of_eight() -> None:
    tiles = torch.rand(2, 42, 42) > 0.5
    packed = pack_mask(tiles)
    assert packed.shape == (2, 42, 6)
    assert np.array_equal(np.unpackbits(packed.numpy(), axis=-1)[..., :42].astype(bool), tiles.numpy())


def test_bicubic_of_a_flat_picture_is_flat() -> None:
    flat = torch.full((3, 17, 9), 77, dtype=torch.uint8)
    assert (resize_bicubic(flat, 50, 31) == 77).all()
