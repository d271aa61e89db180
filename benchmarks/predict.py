"""What bytes and FLOPs alone predict for a GPU: seconds of a region for the authors' algorithm and for garserve.

`python benchmarks/predict.py` measures nothing: every FLOP runs at the data sheet's peak, and every step of decoding
reads the weights once at its bandwidth. Launches, which cost batch-1 decoding most in practice, are left out, so the
ratios are what is left when both sides are perfect.
"""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from garserve.bench.cost import decode_bytes, prefill_flops, tile_flops
from garserve.bench.machine import Peaks
from garserve.config import GARConfig, parse_config
from garserve.presets import PresetName, preset

H100 = Peaks(flops=989e12, bytes=3.35e12)  # NVIDIA's data sheet: bfloat16 without sparsity, HBM3
_MODELS: tuple[PresetName, PresetName] = ("GAR-1B", "GAR-8B")
_HEAD, _TAIL = 60, 65  # tokens of text before a prompt's region and after it
_GROUP = 5
# Shares of the tiles that are computed at 20 regions an image, one by one and five together, by the most tiles an image
# is cut into (benchmarks/tiles_computed.py, real masks).
_COMPUTED = {8: (0.479, 0.193), 16: (0.321, 0.177)}


def main(
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 80,
    together: Annotated[int, typer.Option(min=1, help="Requests that garserve decodes at a time.")] = 64,
) -> None:
    """Print one region a request and groups of 5, for both released shapes on an H100, at 20 regions an image."""
    columns = ("tower ms", "prefill ms", "decode ms", "a region ms", "upstream / it")
    table = Table("", *columns, title="H100, bfloat16, by limits")
    for name in _MODELS:
        config = parse_config(*preset(name))
        single, grouped = _COMPUTED[config.max_num_tiles]
        whole = sum(seconds(config, 1.0, 1, answer, 1))
        for label, computed, group, batch in (
            ("upstream", 1.0, 1, 1),
            ("garserve", single, 1, together),
            (f"garserve, groups of {_GROUP}", grouped, _GROUP, together),
        ):
            parts = seconds(config, computed, group, answer, batch)
            cells = [f"{1e3 * part:.1f}" for part in (*parts, sum(parts))]
            table.add_row(f"{name}, {label}", *cells, f"{whole / sum(parts):.1f}")
    Console(width=100).print(table)


def seconds(config: GARConfig, computed: float, group: int, answer: int, together: int) -> tuple[float, float, float]:
    """Return a region's seconds of tower, prefill and decoding.

    `computed` is the share of all tiles that go through the tower; `group` regions share the tokens up to their own.
    """
    cells, tiles = config.tokens_per_tile, 1 + config.max_num_tiles
    head, tail = _HEAD + tiles * cells, cells + _TAIL
    prefill = prefill_flops(config, head) / group + prefill_flops(config, head + tail, head)
    decode = answer * decode_bytes(config, head + tail + answer // 2, 2, together) / together
    return (computed * tiles * tile_flops(config) / H100.flops, prefill / H100.flops, decode / H100.bytes)


if __name__ == "__main__":
    typer.run(main)
