"""The pictures that rows of an output name: files, members of tar shards, rows of Parquet files."""

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco

from garserve.batch.source_parquet import parquet_module
from garserve.errors import ImageError, InputError
from garserve.inputs.images import load_image
from garserve.inputs.shapes import Mask


def row_image(name: str, folder: Path | None = None) -> NDArray[np.uint8] | None:
    """Return a row's picture as RGB uint8 [H, W, 3]; None where it is gone or was never a file.

    `folder` is where pictures lie now, if not where they were.
    """
    container, inside, member = name.rpartition("::")
    path = Path(container if inside else name)
    if folder is not None:
        path = folder / path.name
    try:
        if not inside:
            return load_image(path)
        return load_image(_tar_member(path, member) if path.suffix == ".tar" else _parquet_cell(path, int(member)))
    except (InputError, ValueError, OSError):
        return None


def _tar_member(path: Path, name: str) -> bytes:
    try:
        with tarfile.open(path, "r:") as shard:
            file = shard.extractfile(name)
            return file.read() if file else b""
    except (tarfile.TarError, KeyError) as error:
        raise ImageError(f"{path}: {name}: cannot be read ({error})") from None


def _parquet_cell(path: Path, number: int) -> bytes:
    file = parquet_module().ParquetFile(path)
    for group in range(file.metadata.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if number < size:
            cell: Any = file.read_row_group(group, columns=["image"])["image"][number].as_py()
            return bytes(cell["bytes"] if isinstance(cell, dict) else cell)
        number -= size
    raise ImageError(f"{path}: has no row {number}")


def thumbnail(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return the image with its longer side at most `side` pixels."""
    small = Image.fromarray(image)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small)


def row_masks(row: dict[str, Any], height: int, width: int) -> list[Mask]:
    """Return the masks of a row's regions at another size, [height, width]; none where they cannot be read."""
    masks = []
    for rle in row.get("regions", []):
        try:
            mask = Image.fromarray(coco.decode(rle) * np.uint8(255))
        except (TypeError, ValueError, LookupError, AttributeError):
            return []
        # An area's mean, so that a region of a few pixels does not vanish.
        masks.append(np.asarray(mask.resize((width, height), Image.Resampling.BOX)) >= 64)
    return masks
