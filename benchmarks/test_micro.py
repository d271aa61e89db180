"""Microbenchmarks of what a request passes through, by pytest-benchmark: `pytest benchmarks/test_micro.py`.

At the shape of GAR-1B, without weights. Each asserts something about what it has computed.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from garserve.kernels.replay_op import roi_replay
from pycocotools import mask as coco

from garserve.bench.workload import picture, region
from garserve.config import GARConfig, read_config
from garserve.inputs.processor import Processor
from garserve.inputs.prompts import assemble
from garserve.inputs.regions import normalised_box
from garserve.inputs.request import RegionRequest
from garserve.inputs.rle import decode_rle
from garserve.inputs.tiles import pack_mask, tile_image, tile_mask
from garserve.model.patch_tokens import normalise, unpack
from garserve.model.random_checkpoint import write_files
from garserve.presets import preset

pytest.importorskip("pytest_benchmark", reason="needs the extra bench")
SIZE, GRID = (1920, 1440), (4, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of GAR-1B's shape without weights."""
    made = tmp_path_factory.mktemp("shape")
    write_files(made, *preset("GAR-1B"), "Describe this masked region in detail.")
    return made


@pytest.fixture(scope="module")
def config(folder: Path) -> GARConfig:
    """Its configuration."""
    return read_config(folder)


@pytest.mark.parametrize("regions", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_replay(benchmark: Any, config: GARConfig, regions: int, dtype: torch.dtype) -> None:
    """All regions of an image of 16 tiles."""
    across, down = GRID
    side = config.tokens_per_side
    features = torch.randn(across * down, side**2, config.hidden_size).to(dtype)
    corners = torch.rand(regions, 2, 2).sort(dim=1).values * side * across
    table = torch.arange(across * down, dtype=torch.int32)
    plan = torch.tensor([[0, across, down, i * side**2] for i in range(regions)], dtype=torch.int32)
    out = torch.full((regions * side**2, config.hidden_size), float("nan"), dtype=dtype)
    benchmark(roi_replay, features, table, plan, corners.flatten(1), out, side)
    assert out.isfinite().all()


def test_normalise(benchmark: Any, config: GARConfig) -> None:
    """Seventeen uint8 tiles to floats."""
    tiles = torch.randint(0, 256, (17, 3, 448, 448), dtype=torch.uint8)
    assert benchmark(normalise, tiles, config, torch.float32).abs().max() <= 1


def test_unpack(benchmark: Any) -> None:
    """Seventeen mask tiles of bits."""
    masks = torch.rand(17, 448, 448) < 0.3
    assert torch.equal(benchmark(unpack, pack_mask(masks), 448).bool(), masks)


def test_tile_image(benchmark: Any) -> None:
    """Both bicubic resizes of a photograph."""
    tiled = benchmark.pedantic(tile_image, (picture(0, SIZE), 16, 448), rounds=5)
    assert tiled.tiles.shape[1:] == (3, 448, 448)


def test_tile_mask(benchmark: Any) -> None:
    """Both nearest resizes of a mask, and its bits."""
    mask = region(0, SIZE)
    bits = benchmark(lambda: pack_mask(tile_mask(mask, GRID, 448)))
    assert bits.any()


def test_hash_tiles(benchmark: Any) -> None:
    """The content of seventeen tiles."""
    tiles = np.random.default_rng(0).integers(0, 256, (17, 3, 448, 448), dtype=np.uint8)
    assert len(set(benchmark(lambda: [blake3(tile.data).digest() for tile in tiles]))) == 17


def test_decode_rle(benchmark: Any) -> None:
    """COCO's compressed form to a mask."""
    mask = region(3, SIZE)
    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    decoded = benchmark(decode_rle, encoded, SIZE[1], SIZE[0])
    assert np.array_equal(decoded, mask)


def test_box_of_mask(benchmark: Any) -> None:
    """A mask's normalised box."""
    box = benchmark(normalised_box, region(3, SIZE))
    assert 0 <= box[0] < box[2] < 1


def test_assemble_prompt(benchmark: Any, config: GARConfig, folder: Path) -> None:
    """Token ids of a prompt with 17 tiles and 5 regions."""
    tokenizer = Processor(folder, config).tokenizer
    request = RegionRequest(
        np.zeros((8, 8, 3), np.uint8), [[0, 0, 4, 4]] * 5, "How does <Prompt0> relate to <Prompt4>?"
    )
    prompt = benchmark(assemble, request, 17, tokenizer, config)
    assert len(prompt.region_spans) == 5


def test_another_region_of_an_image(benchmark: Any, config: GARConfig, folder: Path) -> None:
    """All that the front process does for a region of an image that it has tiled already."""
    processor, image = Processor(folder, config), picture(0, SIZE)
    request = RegionRequest(image, [region(5, SIZE)])
    first = processor(request)
    assert benchmark(processor, request).items[0].hash == first.items[0].hash
