"""RoI replay as one Triton launch: any number of regions of any number of images, read where the tiles' features lie.

Rows of the output are flattened over regions and bins, so a program may span several small regions. Positions and sums
are float32; samples are those of torchvision's roi_align(aligned=True) with a fixed sampling_ratio.
"""

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Tuning:
    """Output rows and channels of one program, and its warps."""

    rows: int
    channels: int
    warps: int


# What `make gpu-check` tries on a new device.
CANDIDATES = (
    Tuning(8, 256, 4),
    Tuning(4, 256, 4),
    Tuning(16, 128, 4),
    Tuning(16, 256, 4),
    Tuning(16, 256, 8),
    Tuning(32, 128, 8),
    Tuning(16, 512, 8),
)
# By compute capability; architectures that are not listed take the default.
TUNED = {80: Tuning(16, 256, 8), 90: Tuning(16, 256, 8), 100: Tuning(16, 256, 8)}
DEFAULT = Tuning(16, 256, 8)
_LARGEST_BLOCK = 2**20  # values of one tensor in Triton


@triton.jit
def _line(start, end, bin_index, sample, size, BINS: tl.constexpr, SAMPLES: tl.constexpr):
    """One sample of each bin along one axis: its two cells, the fraction between them, and whether it counts."""
    low = start - 0.5
    step = (end - 0.5 - low) / BINS
    position = low + bin_index.to(tl.float32) * step + (sample + 0.5) * step / SAMPLES
    counts = (position >= -1.0) & (position <= size.to(tl.float32))
    last = size - 1
    position = tl.minimum(tl.maximum(position, 0.0), last.to(tl.float32))
    near = tl.floor(position)
    fraction = position - near
    near_cell = near.to(tl.int32)
    return near_cell, tl.minimum(near_cell + 1, last), fraction, counts


@triton.jit
def _add(
    total,
    features,
    table,
    first,
    across,
    y,
    x,
    weight,
    live,
    channel,
    inside,
    tile_stride,
    token_stride,
    N: tl.constexpr,
):
    """Add one cell's weighted features for each row to `total`; tiles that the table lacks count as zero."""
    slot = tl.load(table + first + (y // N) * across + x // N, mask=live, other=-1).to(tl.int64)
    place = slot * tile_stride + ((y % N) * N + x % N).to(tl.int64) * token_stride
    shown = (live & (slot >= 0))[:, None] & inside[None, :]
    cells = tl.load(features + place[:, None] + channel[None, :], mask=shown, other=0.0)
    return tl.fma(cells.to(tl.float32), tl.broadcast_to(weight[:, None], cells.shape), total)


@triton.jit
def nearest_bfloat16(values):
    """Round float32 to the nearest value of bfloat16, ties to even: the interpreter's own conversion cuts off."""
    bits = values.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def roi_replay_kernel(
    features,
    table,
    regions,
    boxes,
    out,
    row_count,
    channel_count,
    tile_stride,
    token_stride,
    out_stride,
    N: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Write rows [ROWS] by channels [CHANNELS] of the replay; `row_count` is regions · N²."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live, inside = row < row_count, channel < channel_count
    region, bin_index = row // (N * N), (row % (N * N)).to(tl.int32)
    first = tl.load(regions + region * 4, mask=live, other=0).to(tl.int64)
    across = tl.load(regions + region * 4 + 1, mask=live, other=1)
    down = tl.load(regions + region * 4 + 2, mask=live, other=1)
    target = tl.load(regions + region * 4 + 3, mask=live, other=0).to(tl.int64) + bin_index
    x1 = tl.load(boxes + region * 4, mask=live, other=0.0)
    y1 = tl.load(boxes + region * 4 + 1, mask=live, other=0.0)
    x2 = tl.load(boxes + region * 4 + 2, mask=live, other=0.0)
    y2 = tl.load(boxes + region * 4 + 3, mask=live, other=0.0)
    total = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    for sample in tl.static_range(SAMPLES * SAMPLES):
        top, bottom, fy, counts_y = _line(y1, y2, bin_index // N, sample // SAMPLES, down * N, N, SAMPLES)
        left, right, fx, counts_x = _line(x1, x2, bin_index % N, sample % SAMPLES, across * N, N, SAMPLES)
        read = live & counts_y & counts_x
        common = (read, channel, inside, tile_stride, token_stride, N)
        total = _add(total, features, table, first, across, top, left, (1 - fy) * (1 - fx), *common)
        total = _add(total, features, table, first, across, top, right, (1 - fy) * fx, *common)
        total = _add(total, features, table, first, across, bottom, left, fy * (1 - fx), *common)
        total = _add(total, features, table, first, across, bottom, right, fy * fx, *common)
    total = total / (SAMPLES * SAMPLES)
    if ROUND:
        total = nearest_bfloat16(total)
    place = target[:, None] * out_stride + channel[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


def roi_replay_triton(
    features: torch.Tensor,
    table: torch.Tensor,
    regions: torch.Tensor,
    boxes: torch.Tensor,
    out: torch.Tensor,
    tokens_per_side: int,
    sampling_ratio: int,
    tuning: Tuning | None = None,
) -> None:
    """Launch the kernel on the tensors of `replay_op.roi_replay`; nothing is read back to the host."""
    rows, channels = len(regions) * tokens_per_side**2, features.shape[2]
    if not rows or not channels:
        return
    chosen = tuning or _tuning(features, rows)
    grid = (triton.cdiv(rows, chosen.rows), triton.cdiv(channels, chosen.channels))
    roi_replay_kernel[grid](
        features,
        table,
        regions,
        boxes,
        out,
        rows,
        channels,
        features.stride(0),
        features.stride(1),
        out.stride(0),
        N=tokens_per_side,
        SAMPLES=sampling_ratio,
        ROWS=chosen.rows,
        CHANNELS=chosen.channels,
        ROUND=INTERPRETED and out.dtype == torch.bfloat16,
        num_warps=chosen.warps,
        enable_fp_fusion=False,  # positions as torchvision rounds them; sums ask for fma themselves
    )


def _tuning(features: torch.Tensor, rows: int) -> Tuning:
    width = triton.next_power_of_2(features.shape[2])
    if features.device.type == "cpu":  # the interpreter, whose programs cost the same whatever their size
        return Tuning(min(triton.next_power_of_2(rows), 1024, max(_LARGEST_BLOCK // width, 1)), width, 4)
    major, minor = torch.cuda.get_device_capability(features.device)
    tuned = TUNED.get(10 * major + minor, DEFAULT)
    return tuned if width >= tuned.channels else Tuning(tuned.rows, max(width, 16), tuned.warps)
