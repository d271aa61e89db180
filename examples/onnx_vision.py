"""Embeddings of an image and one region by the exported models alone: onnxruntime, numpy and pillow, no torch.

    garserve export vision tiny -o models && garserve export replay tiny -o models
    python examples/onnx_vision.py models photo.jpg mask.png embeddings.npz

The mask is an image of the photograph's size; whatever is not black in it is the region. Pillow's bicubic differs from
garserve's own by a few grey levels here and there, so these embeddings are near the engine's, and not the same bits.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def open_model(path: Path) -> tuple[onnxruntime.InferenceSession, dict]:
    """Open a model and read the configuration that it carries."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session, json.loads(session.get_modelmeta().custom_metadata_map["garserve.config"])


def choose_grid(width: int, height: int, most: int, side: int) -> tuple[int, int]:
    """Choose tiles across and down: the fewest-pixels-wasted canvas that holds the image, or the nearest in ratio.

    A simple stand-in for garserve.inputs.tiles.choose_grid, which follows the authors' processor in every tie.
    """
    grids = [(across, down) for across in range(1, most + 1) for down in range(1, most // across + 1)]
    holding = [grid for grid in grids if grid[0] * side >= width and grid[1] * side >= height]
    if not holding:
        return min(grids, key=lambda grid: (abs(np.log(grid[0] / grid[1] * height / width)), -grid[0] * grid[1]))
    return max(holding, key=lambda grid: min(grid[0] * side / width, grid[1] * side / height))


def cut(picture: Image.Image, grid: tuple[int, int], side: int, how: Image.Resampling) -> np.ndarray:
    """Stretch a picture over the grid and cut it, the thumbnail first: uint8 [1 + across*down, side, side, ...]."""
    across, down = grid
    canvas = np.asarray(picture.resize((across * side, down * side), how))
    tiles = canvas.reshape(down, side, across, side, -1).swapaxes(1, 2).reshape(across * down, side, side, -1)
    return np.concatenate([np.asarray(picture.resize((side, side), how)).reshape(1, side, side, -1), tiles])


def embed(models: Path, picture: Image.Image, region: Image.Image) -> dict[str, np.ndarray]:
    """Return `image` [T, n², C], the thumbnail first, and `region` [n², C], both float32."""
    vision, config = open_model(models / "vision.onnx")
    replay, _ = open_model(models / "replay.onnx")
    if region.size != picture.size:
        raise SystemExit(f"mask: expected {picture.size} pixels, as the image, got {region.size}")
    side = config["vision"]["image_size"]
    grid = choose_grid(*picture.size, config["max_num_tiles"], side)
    marked = region.convert("L").point(lambda value: 255 if value else 0)
    tiles = cut(picture.convert("RGB"), grid, side, Image.Resampling.BICUBIC).transpose(0, 3, 1, 2)
    masks = cut(marked, grid, side, Image.Resampling.NEAREST)[..., 0]
    feeds = {"tiles": np.ascontiguousarray(tiles), "masks": np.ascontiguousarray(masks)}
    features = vision.run(["features"], feeds)[0]
    rows, columns = np.nonzero(np.asarray(marked))
    if not len(rows):
        raise SystemExit("mask: expected a region that is not black, got none")
    width, height = picture.size
    box = [columns.min() / width, rows.min() / height, columns.max() / width, rows.max() / height]
    feeds = {"features": features[1:], "boxes": np.array([box], np.float32), "grid": np.array(grid, np.int64)}
    return {"image": features, "region": replay.run(["tokens"], feeds)[0][0]}


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    made = embed(Path(sys.argv[1]), Image.open(sys.argv[2]), Image.open(sys.argv[3]))
    np.savez(sys.argv[4], **made)
    print(", ".join(f"{name} {list(value.shape)}" for name, value in made.items()), "->", sys.argv[4])
