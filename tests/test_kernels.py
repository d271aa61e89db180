"""Every implementation of roi_replay against the scalar float64 loops, over regions of every kind."""

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from garserve.kernels import replay_op
from garserve.kernels.patch_embed import fold, patch_embed
from garserve.kernels.replay_op import FORCE, roi_replay
from garserve.kernels.roi_replay_ref import roi_replay_ref, roi_replay_tiles_ref
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

# One launch has 0 to 64 regions, about 9 in the mean; more launches by GARSERVE_LAUNCHES.
LAUNCHES = int(os.environ.get("GARSERVE_LAUNCHES", "100"))
DEVICE = os.environ.get("GARSERVE_TEST_DEVICE", "cpu")  # where Triton's kernels run
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
KINDS = ("inside", "any", "outside", "no area", "inverted", "on cells", "at the limits", "small", "whole", "released")


@dataclass(frozen=True)
class Launch:
    """The arguments of one call; `rows` are the output rows that it must fill."""

    features: torch.Tensor
    table: torch.Tensor
    regions: torch.Tensor
    boxes: torch.Tensor
    out: torch.Tensor
    side: int
    sampling: int

    @property
    def rows(self) -> torch.Tensor:
        starts = self.regions[:, 3].long()
        return (starts[:, None] + torch.arange(self.side**2)).flatten()


def box_of(kind: str, width: int, height: int, rng: np.random.Generator) -> list[float]:
    """Draw a box in the cells of a map."""
    size = np.array([width, height, width, height], dtype=float)
    low, high = np.sort(rng.random((2, 2)), axis=0)
    inside = np.concatenate([low, high]) * size
    some = np.concatenate([rng.uniform(-0.6, 1.4, 2), rng.uniform(-0.6, 1.4, 2)]) * size
    box = {
        "inside": inside,
        "any": some,
        "outside": inside + size * rng.choice([-2, 2]),
        "no area": np.concatenate([inside[:2], inside[:2]]),
        "inverted": inside[[2, 3, 0, 1]],
        "on cells": np.round(inside * 2) / 2,
        "at the limits": rng.choice([-0.5, 0.0, 0.5, 1.0], 4) + np.array([0, 0, width, height]),
        "small": np.concatenate([inside[:2], inside[:2] + rng.uniform(0, 0.5, 2)]),
        "whole": np.array([0, 0, width, height]),
        "released": inside / 28,
    }[kind]
    return [float(np.float32(edge)) for edge in box]


@st.composite
def launches(draw: st.DrawFn) -> Launch:
    side = draw(st.sampled_from([4, 4, 8, 8, 16]))
    channels = draw(st.sampled_from([8, 8, 64, 100, 2048]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    grids = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3))
    most = {4: 64, 8: 24, 16: 6}[side]
    owners = draw(st.lists(st.integers(0, len(grids) - 1), max_size=most))
    kinds = [draw(st.sampled_from(KINDS)) for _ in owners]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    entries = sum(across * down for across, down in grids)
    slots = entries + int(rng.integers(4))
    table = rng.permutation(slots)[:entries].astype(np.int32)
    if draw(st.booleans()):
        table[rng.random(entries) < 0.2] = -1
    firsts = np.cumsum([0, *(across * down for across, down in grids)])
    starts = rng.permutation(len(owners)) * (side**2 + 1) + int(rng.integers(3))  # rows in any order, with gaps
    boxes = [
        box_of(kind, grids[owner][0] * side, grids[owner][1] * side, rng)
        for owner, kind in zip(owners, kinds, strict=True)
    ]
    return Launch(
        strided(rng.standard_normal((slots, side**2, channels), dtype=np.float32), dtype, draw(st.booleans())),
        torch.from_numpy(table),
        torch.tensor(
            [[firsts[owner], *grids[owner], start] for owner, start in zip(owners, starts, strict=True)],
            dtype=torch.int32,
        ).reshape(-1, 4),
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.full((len(owners) * (side**2 + 1) + 5, channels), float("nan"), dtype=dtype),
        side,
        draw(st.sampled_from([2, 2, 2, 1, 3])),
    )


def strided(values: np.ndarray, dtype: torch.dtype, apart: bool) -> torch.Tensor:
    """Values as a tensor; `apart` leaves gaps between tiles, tokens and channels' ends."""
    tensor = torch.from_numpy(values).to(dtype)
    if not apart:
        return tensor
    slots, tokens, channels = tensor.shape
    wide = torch.full((slots, tokens + 1, channels + 3), float("nan"), dtype=dtype)
    wide[:, :tokens, :channels] = tensor
    return wide[:, :tokens, :channels]


def check(launch: Launch, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE, implementation)
    untouched = torch.ones(len(launch.out), dtype=torch.bool)
    untouched[launch.rows] = False
    launch.out[untouched] = 7.0
    arguments = (launch.features, launch.table, launch.regions, launch.boxes)
    device = DEVICE if implementation == "triton" else "cpu"
    out = launch.out.to(device)
    roi_replay(*(tensor.to(device) for tensor in arguments), out, launch.side, launch.sampling)
    assert bool((out.cpu()[untouched] == 7.0).all())
    truth = roi_replay_tiles_ref(*arguments, launch.side, launch.sampling).flatten(0, 1)
    ours = out.cpu()[launch.rows].double()
    assert not ours.isnan().any()
    if len(truth):
        assert (ours - truth).abs().max() <= TOLERANCE[launch.features.dtype] * truth.abs().max()


FUZZ = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@settings(FUZZ, max_examples=2 * LAUNCHES)
@given(launch=launches())
def test_cpu_is_the_truth(launch: Launch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        check(launch, "cpu", patch)


@settings(FUZZ, max_examples=LAUNCHES)
@given(launch=launches())
def test_triton_is_the_truth(launch: Launch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        check(launch, "triton", patch)


def test_more_rows_and_channels_than_one_block_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine regions of 64 rows by 2048 channels are over 2²⁰ values, which Triton takes in one tensor."""
    rng = np.random.default_rng(0)
    regions = torch.tensor([[0, 1, 1, 64 * i] for i in range(9)], dtype=torch.int32)
    boxes = torch.tensor([box_of("inside", 8, 8, rng) for _ in regions])
    features = torch.from_numpy(rng.standard_normal((1, 64, 2048), dtype=np.float32))
    out = torch.full((9 * 64, 2048), float("nan"))
    check(Launch(features, torch.zeros(1, dtype=torch.int32), regions, boxes, out, 8, 2), "triton", monkeypatch)


def small(**changes: object) -> dict[str, object]:
    arguments: dict[str, object] = {
        "features": torch.randn(4, 16, 8),
        "table": torch.arange(4, dtype=torch.int32),
        "regions": torch.tensor([[0, 2, 2, 1]], dtype=torch.int32),
        "boxes": torch.tensor([[1.0, 1.0, 6.5, 5.0]]),
        "out": torch.zeros(20, 8),
        "tokens_per_side": 4,
    }
    return arguments | changes


def test_tiles_are_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth over tiles is the truth over the merged map."""
    arguments = small()
    features = arguments["features"]
    merged = features.reshape(2, 2, 4, 4, 8).transpose(1, 2).reshape(8, 8, 8)
    truth = roi_replay_ref(merged, (1.0, 1.0, 6.5, 5.0), 4)
    monkeypatch.setenv(FORCE, "truth")
    roi_replay(**arguments)
    torch.testing.assert_close(arguments["out"][1:17].double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chosen", replay_op.IMPLEMENTATIONS)
def test_no_regions(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE, chosen)
    none = {"regions": torch.zeros(0, 4, dtype=torch.int32), "boxes": torch.zeros(0, 4)}
    arguments = small(out=torch.full((3, 8), 2.0), **none)
    if chosen == "triton":
        arguments = {
            name: value.to(DEVICE) if name != "tokens_per_side" else value for name, value in arguments.items()
        }
    roi_replay(**arguments)
    assert bool((arguments["out"] == 2.0).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"features": torch.randn(4, 15, 8)},
            r"features: expected .* \[slots, 16, C\], got torch.float32 \[4, 15, 8\]",
        ),
        ({"features": torch.randn(4, 16, 8).double()}, "features: expected bfloat16, float16 or float32"),
        ({"features": torch.randn(4, 8, 16).transpose(1, 2)}, "features: expected a contiguous last dimension"),
        ({"table": torch.arange(4)}, r"table: expected contiguous int32 \[entries\], got torch.int64"),
        ({"table": torch.arange(8, dtype=torch.int32)[::2]}, r"table: expected contiguous int32 \[entries\], got"),
        ({"regions": torch.zeros(1, 3, dtype=torch.int32)}, r"regions: expected contiguous int32 \[R, 4\]"),
        ({"boxes": torch.zeros(2, 4)}, r"boxes: expected contiguous float32 \[1, 4\]"),
        ({"out": torch.zeros(20, 9)}, r"out: expected torch.float32 \[rows, 8\]"),
        ({"out": torch.zeros(20, 8).bfloat16()}, "out: expected torch.float32"),
        ({"tokens_per_side": 0}, "tokens_per_side, sampling_ratio: expected 1 or more, got 0, 2"),
    ],
)
def test_tensors_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roi_replay(**small(**changes))


def test_unknown_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE, "cuda")
    with pytest.raises(ValueError, match="GARSERVE_REPLAY: expected one of triton, cpu, truth, got 'cuda'"):
        roi_replay(**small())


def test_compile_sees_the_operator() -> None:
    arguments = small()
    positional = (*(arguments[name] for name in ("features", "table", "regions", "boxes", "out")), 4)
    torch.library.opcheck(roi_replay, positional, test_utils=("test_schema", "test_faketensor"))

    def replayed(features: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(20, 8)
        roi_replay(features, *positional[1:4], out, 4)
        return out * 2

    compiled = torch.compile(replayed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments["features"]), replayed(arguments["features"]))


def patches(dtype: torch.dtype, deviation: tuple[float, ...], side: int, patch: int, width: int) -> tuple:
    """Weights, tiles, mask bits, and the two convolutions over normalised pixels in float64."""
    generator = torch.Generator().manual_seed(side)
    pixel, mask = (torch.randn(width, 3, patch, patch, generator=generator).to(dtype) / patch for _ in range(2))
    tiles = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=generator)
    shown = torch.rand(2, side, side, generator=generator) < 0.3
    mean = (0.5, 0.4, 0.3)
    values = (tiles.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
    expected = functional.conv2d(values.double(), pixel.double(), stride=patch)
    expected += functional.conv2d(shown.double()[:, None].expand(-1, 3, -1, -1), mask.double(), stride=patch)
    bits = torch.from_numpy(np.packbits(shown.numpy(), axis=-1))
    weights = fold(pixel.to(DEVICE), mask.to(DEVICE), mean, deviation)
    return weights, tiles.to(DEVICE), bits.to(DEVICE), expected.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("side", "patch", "width"), [(56, 14, 40), (42, 6, 130)])
@pytest.mark.parametrize("deviation", [(0.5, 0.5, 0.5), (0.2, 0.3, 0.25)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_patch_embedding_is_the_two_convolutions(
    dtype: torch.dtype, deviation: tuple[float, ...], side: int, patch: int, width: int
) -> None:
    weights, tiles, bits, expected = patches(dtype, deviation, side, patch, width)
    ours = patch_embed(weights, tiles, bits)
    assert ours.dtype == dtype
    error = (ours.cpu().double() - expected).abs().max() / expected.abs().max()
    assert error <= (1e-6 if dtype == torch.float32 else 1e-2)


def test_patch_embedding_of_what_does_not_fit() -> None:
    weights, tiles, bits, _ = patches(torch.float32, (0.5, 0.5, 0.5), 42, 6, 8)
    assert patch_embed(weights, tiles[:0], bits[:0]).shape == (0, 49, 8)
    with pytest.raises(ValueError, match=r"tiles: expected uint8 \[T, 3, S, S\], got torch.float32"):
        patch_embed(weights, tiles.float(), bits)
    with pytest.raises(ValueError, match=r"masks: expected uint8 \[2, 42, 6\], got torch.uint8 \[2, 42, 5\]"):
        patch_embed(weights, tiles, bits[..., :5])
