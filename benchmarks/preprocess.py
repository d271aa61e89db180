"""Preparing 20 regions of a 12-megapixel photograph: garserve's processor against a transformers-style path.

`python benchmarks/preprocess.py` with the shape of GAR-1B and no weights. The peer is that of
benchmarks/peers/upstream_inputs.py: resizing is torch's own, as in a fast image processor, but it is done again for
every region, as is tokenising the text with all its placeholders. Tiles, mask tiles and token ids have to be equal.
"""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from machine import save
from peers.upstream_inputs import Inputs, Question, UpstreamInputs
from rich.console import Console

from garserve.bench.workload import picture, region
from garserve.config import parse_config, read_config
from garserve.inputs.processor import PreparedRequest, Processor
from garserve.inputs.request import RegionRequest
from garserve.model.patch_tokens import unpack
from garserve.model.random_checkpoint import write_files
from garserve.presets import preset


def main(
    width: Annotated[int, typer.Option(min=1, help="Width of the photograph in pixels.")] = 4000,
    height: Annotated[int, typer.Option(min=1, help="Height of the photograph in pixels.")] = 3000,
    regions: Annotated[int, typer.Option(min=1, help="Regions of each photograph.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of runs, each on a photograph of its own.")] = 5,
    save_results: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/.../preprocess.json.")] = False,
) -> None:
    """Run pairs and print the median ratio."""
    masks = [region(number, (width, height)) for number in range(regions)]
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, preprocessor = preset("GAR-1B")
        write_files(folder, config, preprocessor, "Describe this masked region in detail.")
        parsed = read_config(folder)
        peer = UpstreamInputs(folder, parsed)
        for number in range(rounds):
            image = picture(number, (width, height))
            processor = Processor(folder, parsed)
            start = time.perf_counter()
            prepared = [processor(RegionRequest(image, [mask])) for mask in masks]
            ours.append(time.perf_counter() - start)
            spent = 0.0
            for one, mask in zip(prepared, masks, strict=True):
                start = time.perf_counter()
                inputs = peer(Question.single(image, mask))
                spent += time.perf_counter() - start
                _check(one, inputs, parsed.tile_size)
            theirs.append(spent)
    ratios = [them / us for us, them in zip(ours, theirs, strict=True)]
    figures = {
        "garserve, seconds": round(median(ours), 4),
        "transformers-style, seconds": round(median(theirs), 4),
        "ratio": round(median(ratios), 2),
        "rounds": rounds,
    }
    Console().print(figures)
    if save_results:
        conditions = (
            f"{width}x{height} pixels, {regions} regions one by one, tiles of GAR-1B, medians of {rounds} pairs; equal "
            "tiles, mask tiles and token ids"
        )
        print(save("preprocess", figures, conditions))


def _check(prepared: PreparedRequest, inputs: Inputs, side: int) -> None:
    """Compare what both would give the model. Raises SystemExit."""
    tiles = (inputs.pixels * 127.5 + 127.5).round().to(torch.uint8)
    marked = ((inputs.numbers[:, 0] + 1) / 2 * 255).round() < parse_config(*preset("GAR-1B")).prompt_count
    item = prepared.items[0]
    equal = {
        "tiles": torch.equal(item.tiles, tiles),
        "mask tiles": torch.equal(unpack(item.masks, side).bool(), marked),
        "token ids": prepared.token_ids == inputs.ids.tolist(),
    }
    wrong = [name for name, same in equal.items() if not same]
    if wrong:
        raise SystemExit(f"preprocess: {', '.join(wrong)} differ: no figures")


if __name__ == "__main__":
    typer.run(main)
