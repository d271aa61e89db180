"""Replay of many regions of one image: garserve's operator against its peers.

`python benchmarks/replay.py` in an environment that has torchvision (CONTRIBUTING.md, "Benchmarks"): the authors' loop,
torchvision's roi_align for all regions at once, grid_sample, and the definition compiled by torch (on a CPU that needs
a C++ compiler). Without torchvision the first two are left out. Each allocates its output in the time that counts.
Nothing is printed where outputs disagree. On a GPU also every tuning of the kernel, and how many bytes a second it
moves compared with a copy.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

import torch
import typer
from garserve.kernels.replay_op import roi_replay
from machine import save
from rich.console import Console
from rich.table import Table
from torch.nn import functional

try:
    from torchvision.ops import roi_align
except Exception:  # not installed, or built for another torch
    roi_align = None

SIDE, CHANNELS, GRID = 16, 2048, (4, 4)
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
Replay = Callable[[], torch.Tensor]  # [regions, n², C]


@dataclass(frozen=True)
class Writing:
    """A replay that writes to rows which it is given. Called, it allocates them first, as its peers do."""

    write: Callable[[torch.Tensor], object]
    like: torch.Tensor  # [rows, C]

    def __call__(self) -> torch.Tensor:
        """Write to rows that are allocated now."""
        return self.into(torch.empty_like(self.like))

    def poisoned(self) -> torch.Tensor:
        """The same into rows of NaN: one that is not written shows."""
        return self.into(torch.full_like(self.like, torch.nan))

    def into(self, rows: torch.Tensor) -> torch.Tensor:
        """Write, and return the rows by region: [regions, n², C]."""
        self.write(rows)
        return rows.unflatten(0, (-1, SIDE**2))


@dataclass(frozen=True)
class Case:
    """Regions of one image of 16 tiles: features [tiles, n², C], boxes [R, 4] in cells, and the operator's tensors."""

    features: torch.Tensor
    boxes: torch.Tensor
    table: torch.Tensor
    regions: torch.Tensor
    out: torch.Tensor  # what rows look like that an operator writes; holds no values

    @classmethod
    def random(cls, count: int, dtype: torch.dtype, device: torch.device) -> "Case":
        """Draw features, and boxes inside the image."""
        generator = torch.Generator().manual_seed(count)
        across, down = GRID
        size = torch.tensor([across * SIDE, down * SIDE], dtype=torch.float32)
        corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values * size
        regions = torch.tensor([[0, across, down, i * SIDE**2] for i in range(count)], dtype=torch.int32)
        return cls(
            torch.randn(across * down, SIDE**2, CHANNELS, generator=generator).to(device, dtype),
            corners.flatten(1).to(device),
            torch.arange(across * down, dtype=torch.int32, device=device),
            regions.to(device),
            torch.empty(count * SIDE**2, CHANNELS, dtype=dtype, device=device),
        )

    def ours(self, out: torch.Tensor) -> None:
        """One call of garserve's operator."""
        roi_replay(self.features, self.table, self.regions, self.boxes, out, SIDE)

    def merged(self) -> torch.Tensor:
        """The features of all tiles as one map [1, C, H, W] of float32, as the authors make it for every region."""
        across, down = GRID
        tiles = self.features.reshape(down, across, SIDE, SIDE, CHANNELS).permute(4, 0, 2, 1, 3)
        return tiles.reshape(1, CHANNELS, down * SIDE, across * SIDE).float()

    def align(self, boxes: torch.Tensor) -> torch.Tensor:
        """torchvision's roi_align for some boxes."""
        rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1)
        aligned = roi_align(self.merged(), rois, (SIDE, SIDE), 1.0, sampling_ratio=2, aligned=True)
        return aligned.flatten(2).transpose(1, 2).to(self.features.dtype)

    def sampled(self) -> torch.Tensor:
        """grid_sample at the four points of each bin, and their mean."""
        across, down = GRID
        x1, y1, x2, y2 = (edge[:, None] for edge in self.boxes.unbind(1))
        steps = (torch.arange(2 * SIDE, device=self.boxes.device) + 0.5) / (2 * SIDE)
        x = (x1 + (x2 - x1) * steps) / (across * SIDE) * 2 - 1
        y = (y1 + (y2 - y1) * steps) / (down * SIDE) * 2 - 1
        points = torch.stack([x[:, None, :].expand(-1, 2 * SIDE, -1), y[:, :, None].expand(-1, -1, 2 * SIDE)], dim=-1)
        maps = self.merged().expand(len(self.boxes), -1, -1, -1)
        values = functional.grid_sample(maps, points, padding_mode="border", align_corners=False)
        return functional.avg_pool2d(values, 2).flatten(2).transpose(1, 2).to(self.features.dtype)

    def gathered(self) -> torch.Tensor:
        """The definition in plain torch: a gather for each corner of each sample. A peer when it is compiled."""
        across, down = GRID
        flat, total = self.features.flatten(0, 1), 0
        for sample in range(4):
            top, bottom, fy = _line(self.boxes[:, 1], self.boxes[:, 3], sample // 2, down * SIDE)
            left, right, fx = _line(self.boxes[:, 0], self.boxes[:, 2], sample % 2, across * SIDE)
            for y, wy in ((top, 1 - fy), (bottom, fy)):
                for x, wx in ((left, 1 - fx), (right, fx)):
                    row, column = y[:, :, None], x[:, None, :]
                    tile = (row // SIDE) * across + column // SIDE
                    cell = tile * SIDE**2 + (row % SIDE) * SIDE + column % SIDE
                    weight = wy[:, :, None] * wx[:, None, :]
                    total = total + weight.flatten(1)[..., None] * flat[cell.flatten(1)].float()
        return (total / 4).to(self.features.dtype)

    @property
    def bytes_moved(self) -> float:
        """At least: every output row written, every cell of every box read once."""
        x1, y1, x2, y2 = self.boxes.double().cpu().unbind(1)
        cells = float(((x2 - x1 + 1) * (y2 - y1 + 1)).sum())
        return (cells + len(self.out)) * CHANNELS * self.features.element_size()


def _line(start: torch.Tensor, end: torch.Tensor, sample: int, size: int) -> tuple[torch.Tensor, ...]:
    """One sample of each bin along an axis: its two cells [R, SIDE] and the fraction between them."""
    step = (end - start)[:, None] / SIDE
    place = start[:, None] - 0.5 + (torch.arange(SIDE, device=start.device) + (sample + 0.5) / 2) * step
    place = place.clamp(0, size - 1)
    near = place.floor()
    return near.long(), (near.long() + 1).clamp(max=size - 1), place - near


def main(
    regions: Annotated[list[int] | None, typer.Option(help="How many regions; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Runs of each, one after the other in turns.")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    save_results: Annotated[bool, typer.Option("--save", help="Write .../replay_DEVICE.json.")] = False,
) -> None:
    """Time the replay and print medians, and ratios where the outputs agree."""
    figures: dict[str, dict[str, float]] = {}
    peers = ["grid_sample", "compiled torch"]
    peers = peers if roi_align is None else ["authors' loop", "torchvision batched", *peers]
    columns = ("dtype", "regions", "ours", *(column for peer in peers for column in (peer, "ratio")))
    table = Table(*columns, title="Replay, milliseconds")
    for dtype in (torch.bfloat16, torch.float32):
        for count in regions or [1, 8, 32, 128]:
            case = Case.random(count, dtype, torch.device(device))
            times = _times(_candidates(case), rounds, LIMITS[dtype], device)
            cells = [f"{times['ours']:,.1f}"]
            for peer in peers:
                cells += [f"{times[peer]:,.1f}", f"{times[peer] / times['ours']:.1f}"]
            name = str(dtype).removeprefix("torch.")
            table.add_row(name, str(count), *cells)
            figures[f"{name}, {count} regions"] = {key: round(value, 4) for key, value in times.items()}
            if device == "cuda":
                figures[f"{name}, {count} regions"]["share of copy"] = round(_share_of_copy(case, times["ours"]), 3)
    Console().print(table)
    if save_results:
        conditions = (
            f"milliseconds, medians of {rounds} runs in turns, {GRID[0] * GRID[1]} tiles of {SIDE}² tokens, "
            f"C = {CHANNELS}, random boxes; each allocates its output; outputs within 1e-5 (float32) and 1e-2 "
            "(bfloat16) of the largest value"
        )
        print(save(f"replay_{device}", figures, conditions))


def _candidates(case: Case) -> dict[str, Replay]:
    candidates: dict[str, Replay] = {"ours": Writing(case.ours, case.out)}
    if roi_align is not None:
        candidates["authors' loop"] = lambda: torch.cat([case.align(box[None]) for box in case.boxes])
        candidates["torchvision batched"] = lambda: case.align(case.boxes)
    return candidates | {"grid_sample": case.sampled, "compiled torch": _compiled(case)} | _tunings(case)


def _compiled(case: Case, backend: str | Callable[..., Any] = "inductor") -> Replay:
    """The definition compiled for one case. What was compiled for others is forgotten.

    torch keeps so many forms of a function and runs it uncompiled after that, with no more than a warning; with
    `fullgraph` it refuses.
    """
    torch.compiler.reset()
    return torch.compile(case.gathered, dynamic=False, fullgraph=True, backend=backend)


def _tunings(case: Case) -> dict[str, Replay]:
    """The kernel with every tuning, on a GPU."""
    if case.features.device.type == "cpu":
        return {}
    from garserve.kernels.roi_replay import CANDIDATES, Tuning, roi_replay_triton

    def tuned(tuning: Tuning) -> Replay:
        tensors = (case.features, case.table, case.regions, case.boxes)
        return Writing(lambda out: roi_replay_triton(*tensors, out, SIDE, 2, tuning), case.out)

    return {f"{one.rows}x{one.channels}, {one.warps} warps": tuned(one) for one in CANDIDATES}


def _times(candidates: dict[str, Replay], rounds: int, limit: float, device: str) -> dict[str, float]:
    """Return the median milliseconds of each, run in turns. Raises SystemExit where one disagrees with the first."""
    first: torch.Tensor | None = None
    for name, run in candidates.items():
        output = (run.poisoned() if isinstance(run, Writing) else run()).float()
        first = output if first is None else first
        error = float((output - first).abs().max() / first.abs().max())
        if not error <= limit:
            raise SystemExit(
                f"replay: {name} differs by {error:.1e} of the largest value, limit {limit:.0e}: no figures"
            )
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(_milliseconds(run, device))
    return {name: median(values) for name, values in times.items()}


def _milliseconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _share_of_copy(case: Case, milliseconds: float) -> float:
    """Return the bytes that the replay has to move in its time, as a share of what a large copy moves."""
    source = torch.empty(2**28, dtype=torch.uint8, device=case.features.device)
    target = torch.empty_like(source)
    copied = median(_milliseconds(lambda: target.copy_(source), "cuda") for _ in range(9))
    return (case.bytes_moved / milliseconds) / (2 * source.numel() / copied)


if __name__ == "__main__":
    typer.run(main)
