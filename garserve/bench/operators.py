"""The two operators of the vision half by themselves: the replay of many regions, and the tower over some tiles."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch

from garserve.bench.cost import replay_bytes, tile_flops
from garserve.bench.machine import peaks
from garserve.bench.result import Result, Row
from garserve.config import GARConfig
from garserve.errors import GarserveError
from garserve.inputs.tiles import pack_mask
from garserve.kernels.replay_op import implementation, roi_replay
from garserve.kernels.roi_replay_ref import roi_replay_tiles_ref
from garserve.model.encoder import RegionEncoder

_LIMITS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}  # of the largest value of the truth
_COUNTS = (1, 5, 20, 50, 100)


@dataclass(frozen=True)
class _Case:
    """What the operator takes: regions of one image."""

    features: torch.Tensor  # [tiles, n², C]
    table: torch.Tensor  # int32 [tiles]
    regions: torch.Tensor  # int32 [R, 4]
    boxes: torch.Tensor  # float32 [R, 4]
    side: int  # n

    def run(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """Replay into rows [R · n², C], which are allocated here where none are given, as a caller has to."""
        if out is None:
            out = self.features.new_empty(len(self.regions) * self.side**2, self.features.shape[2])
        roi_replay(self.features, self.table, self.regions, self.boxes, out, self.side)
        return out


def replay(config: GARConfig, grid: tuple[int, int], dtype: str, rounds: int) -> Result:
    """Replay 1 to 100 regions of one image of `grid` tiles (across, down), each count held against the truth first.

    Raises GarserveError where the operator differs from the truth.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []
    for count in _COUNTS:
        case = _replay_case(config, grid, getattr(torch, dtype), device, count)
        _check(case, dtype)
        seconds = _median(case.run, rounds)
        limit = count * replay_bytes(config, case.features.element_size()) / peaks(dtype).bytes
        rows.append({"regions": count, "milliseconds": 1e3 * seconds, "a region": 1e3 * seconds / count})
        rows[-1] |= {"limit ms": 1e3 * limit, "of limit": limit / seconds}
    conditions = (
        f"{grid[0]}x{grid[1]} tiles of {config.tokens_per_side}x{config.tokens_per_side} tokens, width "
        f"{config.hidden_size}, {dtype}, {implementation(device)} on {device.type}, medians of {rounds}; "
        "rows are allocated in each run; limit: rows written once"
    )
    return Result("replay", conditions, rows)


def vision(config: GARConfig, depth: int | None, tiles: int, rounds: int) -> Result:
    """Run `tiles` random tiles through a tower of random weights, `depth` blocks of it."""
    blocks = depth or config.vision.depth
    config = replace(config, vision=replace(config.vision, depth=blocks))
    encoder = RegionEncoder(config).eval().requires_grad_(requires_grad=False)
    if torch.cuda.is_available():
        encoder.place("cuda", torch.bfloat16)
    dtype = str(encoder.projector.linear_1.weight.dtype).removeprefix("torch.")
    generator = torch.Generator().manual_seed(0)
    size = config.tile_size
    pixels = torch.randint(0, 256, (tiles, 3, size, size), dtype=torch.uint8, generator=generator)
    masks = pack_mask(torch.rand(tiles, size, size, generator=generator) < 0.5)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return encoder.features(pixels, masks)

    if not bool(run().isfinite().all()):
        raise GarserveError("vision: the tower gives values that are not finite: no figures")
    seconds = _median(run, rounds)
    limit = tiles * tile_flops(config) / peaks(dtype).flops
    row: Row = {"tiles": tiles, "blocks": blocks, "seconds": seconds, "tiles/s": tiles / seconds}
    row |= {"limit s": limit, "of limit": limit / seconds}
    conditions = (
        f"tower and projector of width {config.vision.width}, random weights, {dtype} in torch, medians of {rounds}; "
        "limit: FLOPs over the measured peak of a matrix product"
    )
    return Result("vision", conditions, [row])


def _replay_case(
    config: GARConfig, grid: tuple[int, int], dtype: torch.dtype, device: torch.device, count: int
) -> _Case:
    """Draw features, and boxes inside the image."""
    (across, down), side = grid, config.tokens_per_side
    generator = torch.Generator().manual_seed(count)
    features = torch.randn(across * down, side**2, config.hidden_size, generator=generator).to(device, dtype)
    span = torch.tensor([across * side, down * side], dtype=torch.float32)
    boxes = (torch.rand(count, 2, 2, generator=generator).sort(dim=1).values * span).flatten(1).to(device)
    table = torch.arange(across * down, dtype=torch.int32, device=device)
    regions = torch.tensor([[0, across, down, i * side**2] for i in range(count)], dtype=torch.int32).to(device)
    return _Case(features, table, regions, boxes, side)


def _check(case: _Case, dtype: str) -> None:
    """Hold the last region against the truth, and see that every row is written. Raises GarserveError."""
    rows, count = case.side**2, len(case.regions)
    out = case.run(case.features.new_full((count * rows, case.features.shape[2]), torch.nan)).cpu()
    if not bool(out.isfinite().all()):
        raise GarserveError(f"replay: {count} regions: rows are not written, or not finite: no figures")
    channels = slice(0, 8)  # the truth is scalar loops
    narrow = case.features[..., channels].cpu().contiguous()
    last = (case.table.cpu(), case.regions[-1:].cpu(), case.boxes[-1:].cpu())
    (truth,) = roi_replay_tiles_ref(narrow, *last, case.side, 2)
    error = float((out[-rows:, channels].double() - truth.double()).abs().max() / truth.abs().max())
    if not error <= _LIMITS[dtype]:
        raise GarserveError(
            f"replay: {count} regions: the last one differs from the truth by {error:.1e}, limit "
            f"{_LIMITS[dtype]:.0e}: no figures"
        )


def _median(run: Callable[[], object], rounds: int) -> float:
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times)
