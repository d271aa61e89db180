"""RoI replay in tile layout against scalar float64 loops, and the windows of tiles that it reads."""

import pytest
import torch
from garserve.kernels.roi_axis import axis_weights, cells_read
from garserve.kernels.roi_replay_ref import roi_replay_ref
from hypothesis import given, settings
from hypothesis import strategies as st

from garserve.config import GARConfig, parse_config
from garserve.inputs.roi import RoI, Window, replay_roi
from garserve.model.replay import replay
from garserve.presets import preset

CONFIG: GARConfig = parse_config(*preset("mini"))
edges = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0, 1 / 3]))


def tiles_of(cells: torch.Tensor, side: int) -> torch.Tensor:
    height, width, channels = cells.shape
    cut = cells.reshape(height // side, side, width // side, side, channels).transpose(1, 2)
    return cut.reshape(-1, side * side, channels)


@settings(max_examples=150, deadline=None)
@given(
    across=st.integers(1, 6),
    down=st.integers(1, 6),
    xs=st.tuples(edges, edges),
    ys=st.tuples(edges, edges),
    scale=st.sampled_from(["released", "geometric"]),
    seed=st.integers(0, 99),
)
def test_replay_of_the_window_equals_the_truth_on_the_whole_map(across, down, xs, ys, scale, seed) -> None:
    side, grid = CONFIG.tokens_per_side, (across, down)
    cells = torch.randn(down * side, across * side, 5, generator=torch.Generator().manual_seed(seed))
    box = (min(xs), min(ys), max(xs), max(ys))
    roi = replay_roi(box, grid, CONFIG.with_box_scale(scale))
    chosen = [i - 1 for i in roi.window.tile_indices(grid)]
    ours = replay(tiles_of(cells, side)[chosen], roi, side)
    truth = roi_replay_ref(cells, roi.box, side)
    assert ours.shape == (side * side, 5)
    assert (ours - truth).abs().max() <= 1e-5 * truth.abs().max().clamp(min=1e-3)


@settings(max_examples=150, deadline=None)
@given(
    x1=st.floats(-12, 30),
    y1=st.floats(-12, 30),
    width=st.floats(-3, 40),
    height=st.floats(-3, 40),
    bins=st.sampled_from([1, 4, 7, 16]),
    sampling=st.integers(1, 3),
)
def test_boxes_of_every_degenerate_kind(x1, y1, width, height, bins, sampling) -> None:
    """Outside, across the border, without area, inverted: the two matrices are the loops."""
    cells = torch.randn(8, 12, 3, generator=torch.Generator().manual_seed(1))
    box = tuple(float(torch.tensor(edge)) for edge in (x1, y1, x1 + width, y1 + height))
    down = axis_weights(box[1], box[3], 8, bins, sampling).double()
    across = axis_weights(box[0], box[2], 12, bins, sampling).double()
    ours = torch.einsum("by,ax,yxc->bac", down, across, cells.double()).reshape(bins * bins, 3)
    truth = roi_replay_ref(cells, box, bins, sampling)
    # A sample exactly at the limit of -1 or the size counts or not by one rounding; leave those boxes out.
    edges_hit = min(
        abs(position - limit)
        for start, end, size in ((box[0], box[2], 12), (box[1], box[3], 8))
        for i in range(bins * sampling)
        for position in (start - 0.5 + (i + 0.5) * (end - start) / (bins * sampling),)
        for limit in (-1.0, float(size))
    )
    if edges_hit > 1e-4:
        assert (ours - truth).abs().max() < 1e-4


def test_released_scale_reads_the_top_left_tile_only() -> None:
    config = parse_config(*preset("GAR-1B"))
    for grid in ((1, 1), (4, 4), (16, 1), (6, 6)):
        assert replay_roi((0.0, 0.0, 1.0, 1.0), grid, config).window == Window(0, 1, 0, 1)


def test_geometric_window_is_what_the_box_touches() -> None:
    config = parse_config(*preset("GAR-1B")).with_box_scale("geometric")
    assert replay_roi((0.0, 0.0, 0.999, 0.999), (4, 4), config).window == Window(0, 4, 0, 4)
    assert replay_roi((0.3, 0.3, 0.45, 0.45), (4, 4), config).window == Window(1, 2, 1, 2)
    # Bilinear samples of a box that ends just before a tile's border reach over it.
    assert replay_roi((0.3, 0.3, 0.48, 0.45), (4, 4), config).window == Window(1, 2, 1, 2)
    assert replay_roi((0.3, 0.3, 0.499, 0.45), (4, 4), config).window == Window(1, 2, 1, 3)


def test_window_indices_skip_the_thumbnail() -> None:
    assert Window(1, 3, 0, 2).tile_indices((3, 4)) == [4, 5, 7, 8]


def test_cells_read_of_nothing() -> None:
    assert cells_read(torch.zeros(4, 9)) == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_accumulation_is_float32(dtype: torch.dtype) -> None:
    side = CONFIG.tokens_per_side
    tiles = torch.randn(4, side * side, 6).to(dtype)
    roi = RoI((1.0, 1.0, 6.5, 5.0), (2, 2), Window(0, 2, 0, 2))
    ours = replay(tiles, roi, side)
    assert ours.dtype == dtype
    assert torch.equal(ours, replay(tiles.float(), roi, side).to(dtype))
