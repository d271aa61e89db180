"""RoI replay as one torch operator, `garserve::roi_replay`.

Triton on a GPU, `embedding_bag` over the few cells that each output row reads on the CPU.

The environment variable GARSERVE_REPLAY forces an implementation: `triton` (on the CPU only in Triton's interpreter,
TRITON_INTERPRET=1), `cpu`, or `truth`, the scalar loops in float64.
"""

import os

import torch
from garserve.kernels.roi_replay_cpu import roi_replay_cpu
from garserve.kernels.roi_replay_ref import roi_replay_tiles_ref

FORCE = "GARSERVE_REPLAY"
IMPLEMENTATIONS = ("triton", "cpu", "truth")


def implementation(device: torch.device) -> str:
    """Return which implementation runs on a device. Raises ValueError where the environment names an unknown one."""
    forced = os.environ.get(FORCE, "")
    if forced and forced not in IMPLEMENTATIONS:
        raise ValueError(f"{FORCE}: expected one of {', '.join(IMPLEMENTATIONS)}, got {forced!r:.80}")
    return forced or ("cpu" if device.type == "cpu" else "triton")


@torch.library.custom_op("garserve::roi_replay", mutates_args={"out"})
def roi_replay(
    features: torch.Tensor,
    table: torch.Tensor,
    regions: torch.Tensor,
    boxes: torch.Tensor,
    out: torch.Tensor,
    tokens_per_side: int,
    sampling_ratio: int = 2,
) -> None:
    """Replay regions: n² rows of `out` for each, n = `tokens_per_side`, computed in float32.

    `features` [slots, n², C] (bfloat16, float16 or float32; the last dimension contiguous) holds tiles anywhere.
    `table` int32 [entries] says where: an image's entries are its grid of tiles row by row, -1 for one that is not
    there and counts as zero. `regions` int32 [R, 4] has each region's first entry, the grid's width and height in
    tiles, and the first of its rows in `out`; `boxes` float32 [R, 4] is x1, y1, x2, y2 in feature cells of the whole
    map (n · width by n · height). `out` [rows, C] has the features' dtype; its other rows stay as they are. `table`,
    `regions` and `boxes` are contiguous.

    Samples are those of torchvision's roi_align(aligned=True) with `sampling_ratio` samples a bin and axis. All
    tensors are on one device, and nothing is read back to the host of a GPU. Raises ValueError for tensors that do not
    fit together; what they hold is not checked.
    """
    _check(features, table, regions, boxes, out, tokens_per_side, sampling_ratio)
    chosen = implementation(features.device)
    if chosen == "truth":
        truth = roi_replay_tiles_ref(features, table, regions, boxes, tokens_per_side, sampling_ratio)
        for rows, target in zip(truth, regions[:, 3].tolist(), strict=True):
            out[target : target + tokens_per_side**2] = rows
    elif chosen == "cpu":
        if features.device.type != "cpu":
            raise ValueError(f"{FORCE}=cpu: expected tensors on the CPU, got {features.device}")
        roi_replay_cpu(features, table, regions, boxes, out, tokens_per_side, sampling_ratio)
    else:
        from garserve.kernels.roi_replay import INTERPRETED, roi_replay_triton

        if features.device.type == "cpu" and not INTERPRETED:
            raise ValueError(f"{FORCE}=triton: on the CPU, expected TRITON_INTERPRET=1 in the environment")
        roi_replay_triton(features, table, regions, boxes, out, tokens_per_side, sampling_ratio)


@roi_replay.register_fake
def _(
    features: torch.Tensor,
    table: torch.Tensor,
    regions: torch.Tensor,
    boxes: torch.Tensor,
    out: torch.Tensor,
    tokens_per_side: int,
    sampling_ratio: int = 2,
) -> None:
    _check(features, table, regions, boxes, out, tokens_per_side, sampling_ratio)


def _check(
    features: torch.Tensor,
    table: torch.Tensor,
    regions: torch.Tensor,
    boxes: torch.Tensor,
    out: torch.Tensor,
    tokens_per_side: int,
    sampling_ratio: int,
) -> None:
    def expect(fits: bool, name: str, wanted: str, tensor: torch.Tensor) -> None:
        if not fits:
            raise ValueError(
                f"roi_replay: {name}: expected {wanted}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )

    n2 = tokens_per_side**2
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    if tokens_per_side < 1 or sampling_ratio < 1:
        counts = f"{tokens_per_side}, {sampling_ratio}"
        raise ValueError(f"roi_replay: tokens_per_side, sampling_ratio: expected 1 or more, got {counts}")
    fits = features.ndim == 3 and features.shape[1] == n2 and features.dtype in kinds
    expect(fits, "features", f"bfloat16, float16 or float32 [slots, {n2}, C]", features)
    expect(features.shape[2] < 2 or features.stride(2) == 1, "features", "a contiguous last dimension", features)
    fits = table.ndim == 1 and table.dtype == torch.int32 and table.is_contiguous()
    expect(fits, "table", "contiguous int32 [entries]", table)
    fits = regions.ndim == 2 and regions.shape[1] == 4 and regions.dtype == torch.int32 and regions.is_contiguous()
    expect(fits, "regions", "contiguous int32 [R, 4]", regions)
    fits = boxes.shape == regions.shape and boxes.dtype == torch.float32 and boxes.is_contiguous()
    expect(fits, "boxes", f"contiguous float32 {list(regions.shape)}", boxes)
    fits = out.ndim == 2 and out.shape[1] == features.shape[2] and out.dtype == features.dtype
    expect(fits, "out", f"{features.dtype} [rows, {features.shape[2]}]", out)
    expect(out.shape[1] < 2 or out.stride(1) == 1, "out", "a contiguous last dimension", out)
    for name, tensor in (("table", table), ("regions", regions), ("boxes", boxes), ("out", out)):
        expect(tensor.device == features.device, name, f"a tensor on {features.device}", tensor)
