"""Pixels and masks to patch tokens in one Triton launch, from uint8 tiles and packed mask bits.

A tower's two patch convolutions have kernel = stride, so both are one matrix product over [3·p² pixels, p² mask
values]: the mask's three channels are equal, and their weights add up to one channel's. Pixels enter as v - 128, exact
in bfloat16, and normalisation is a scale and a bias on the float32 sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from garserve.kernels.roi_replay import INTERPRETED, nearest_bfloat16

_CENTRE = 128
ROWS, DEPTH, WARPS = 64, 32, 4
COLUMNS = {2: 128, 4: 64}  # by the bytes of a value


@dataclass(frozen=True)
class PatchWeights:
    """Both convolutions as one matrix; see `fold`."""

    matrix: torch.Tensor  # [width, 4·p²], in the tower's dtype
    bias: torch.Tensor  # float32 [width]
    scale: float
    patch: int


def fold(
    pixel_weight: torch.Tensor, mask_weight: torch.Tensor, mean: Sequence[float], deviation: Sequence[float]
) -> PatchWeights:
    """Fold convolutions [width, 3, p, p] over normalised pixels and over three equal mask channels into one matrix.

    `mean` and `deviation` are those of pixels of 0..1, a channel each. Where the deviations are equal, pixel weights
    stay as they are, so that nothing is rounded twice.
    """
    pixel = pixel_weight.float()
    spread = torch.tensor(deviation) * 255.0  # on the CPU: a tensor that goes to a GPU waits for all that runs there
    shift = (_CENTRE - torch.tensor(mean) * 255.0) / spread
    matrix = torch.cat(
        [_by_channel(pixel, spread[0] / spread).flatten(1), mask_weight.float().sum(1).flatten(1)], dim=1
    )
    bias = _by_channel(pixel, shift).sum(dim=(1, 2, 3))
    return PatchWeights(
        matrix.to(pixel_weight.dtype).contiguous(), bias, 1.0 / (deviation[0] * 255.0), pixel_weight.shape[3]
    )


def _by_channel(pixel: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Multiply weights [width, 3, p, p] by a factor a channel."""
    channels = zip(pixel.unbind(1), factors.tolist(), strict=True)
    return torch.stack([channel * factor for channel, factor in channels], dim=1)


@triton.jit
def patch_embed_kernel(
    tiles,
    masks,
    matrix,
    bias,
    out,
    row_count,
    width,
    scale,
    mask_value,
    SIDE: tl.constexpr,
    PATCH: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Write tokens [ROWS] by channels [COLUMNS]; a mask's row has BYTES bytes, `mask_value` stands for a set bit."""
    GRID: tl.constexpr = SIDE // PATCH
    AREA: tl.constexpr = PATCH * PATCH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live, inside = row < row_count, column < width
    tile, place = (row // (GRID * GRID)).to(tl.int64), row % (GRID * GRID)
    top, left = place // GRID * PATCH, place % GRID * PATCH
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, 4 * AREA, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        channel, spot = depth // AREA, depth % AREA
        y, x = top[:, None] + (spot // PATCH)[None, :], left[:, None] + (spot % PATCH)[None, :]
        wanted = live[:, None] & (depth < 4 * AREA)[None, :]
        is_mask = (channel == 3)[None, :]
        at = tile[:, None] * (3 * SIDE * SIDE) + channel[None, :] * (SIDE * SIDE) + y * SIDE + x
        pixels = tl.load(tiles + at, mask=wanted & ~is_mask, other=128).to(tl.float32) - 128.0
        at = tile[:, None] * (SIDE * BYTES) + y * BYTES + x // 8
        bits = (tl.load(masks + at, mask=wanted & is_mask, other=0).to(tl.int32) >> (7 - x % 8)) & 1
        values = tl.where(is_mask, bits.to(tl.float32) * mask_value, pixels)
        at = column[None, :].to(tl.int64) * (4 * AREA) + depth[:, None]
        weights = tl.load(matrix + at, mask=inside[None, :] & (depth < 4 * AREA)[:, None], other=0.0)
        if INTERPRET:  # the interpreter multiplies no bfloat16; the values are exact in either
            total = tl.dot(values, weights.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(values.to(matrix.dtype.element_ty), weights, total, input_precision="ieee")
    total = total * scale + tl.load(bias + column, mask=inside, other=0.0)[None, :]
    if INTERPRET and out.dtype.element_ty == tl.bfloat16:
        total = nearest_bfloat16(total)
    place = row[:, None].to(tl.int64) * width + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


def patch_embed(weights: PatchWeights, tiles: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Embed uint8 tiles [T, 3, S, S] with masks of bits [T, S, ceil(S/8)] as tokens [T, (S/p)², width].

    Sum of pixel and mask embedding, float32 sums in the matrix's dtype; all tensors contiguous, on one device. Raises
    ValueError where shapes do not fit.
    """
    count, side, width = len(tiles), tiles.shape[-1], len(weights.matrix)
    expected = (count, side, -(-side // 8))
    if tiles.shape != (count, 3, side, side) or side % weights.patch or tiles.dtype != torch.uint8:
        raise ValueError(f"patch_embed: tiles: expected uint8 [T, 3, S, S], got {tiles.dtype} {list(tiles.shape)}")
    if masks.shape != expected or masks.dtype != torch.uint8:
        raise ValueError(f"patch_embed: masks: expected uint8 {list(expected)}, got {masks.dtype} {list(masks.shape)}")
    patches = (side // weights.patch) ** 2
    out = torch.empty(count, patches, width, device=tiles.device, dtype=weights.matrix.dtype)
    if not count:
        return out
    columns = COLUMNS[weights.matrix.element_size()]
    patch_embed_kernel[(triton.cdiv(count * patches, ROWS), triton.cdiv(width, columns))](
        tiles.contiguous(),
        masks.contiguous(),
        weights.matrix,
        weights.bias,
        out,
        count * patches,
        width,
        weights.scale,
        1.0 / weights.scale,
        SIDE=side,
        PATCH=weights.patch,
        BYTES=expected[2],
        ROWS=ROWS,
        COLUMNS=columns,
        DEPTH=DEPTH,
        INTERPRET=INTERPRETED,
        num_warps=WARPS,
    )
    return out
