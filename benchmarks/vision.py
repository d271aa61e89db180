"""One tile through the tower of GAR-1B's size, in torch and in ONNX Runtime, in every form that runs here.

`python benchmarks/vision.py --depth 4` with random weights; at the full depth of 23 the time is mostly that of more
blocks. In an environment with onnxruntime-openvino, OpenVINO is one more peer (CONTRIBUTING.md, "Benchmarks"). Nothing
is printed where outputs disagree.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from garserve.export.quantise import quantise
from garserve.export.samples import Tiles, random_tiles, relative_error
from garserve.export.vision import write_graph
from machine import save
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from garserve.config import GARConfig, parse_config
from garserve.inputs.tiles import pack_mask
from garserve.model.encoder import RegionEncoder
from garserve.model.fingerprint import vision_settings
from garserve.model.onnx_file import ModelInfo
from garserve.model.onnx_vision import OnnxVision
from garserve.presets import preset

LIMITS = {"fp32": 1e-4, "bf16": 5e-2, "int8": 5e-2}  # of the largest value of torch in float32
BASE = "torch SDPA fp32"
Features = Callable[[Tiles], torch.Tensor]


def main(
    depth: Annotated[int, typer.Option(min=1, help="Blocks of the tower; GAR-1B has 23.")] = 4,
    tiles: Annotated[int, typer.Option(min=1, help="Tiles at once.")] = 1,
    rounds: Annotated[int, typer.Option(min=3, help="Runs of each, one after the other in turns.")] = 5,
    save_results: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/.../vision.json.")] = False,
) -> None:
    """Time the tower and print medians, and errors against torch in float32.

    Beside wall time, the time that all of the process's threads spent computing, which a busy machine changes less.
    """
    config = parse_config(*preset("GAR-1B"))
    config = replace(config, vision=replace(config.vision, depth=depth))
    encoder, sample = random_encoder(config), random_tiles(config, tiles)
    with TemporaryDirectory() as folder:
        peers = {**_torch(encoder), **_onnx(encoder, Path(folder))}
        errors = _compared(peers, sample)
        times: dict[str, list[float]] = {name: [] for name in peers}
        spent_by_threads: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(rounds):
            for name, (_, run) in peers.items():
                start, begin = time.perf_counter(), time.process_time()
                run(sample)
                times[name].append(time.perf_counter() - start)
                spent_by_threads[name].append(time.process_time() - begin)
    base = median(times[BASE])
    table = Table(
        "", "median", "fastest", "threads' time", "speed", "error", title=f"{tiles} tiles, {depth} blocks, seconds"
    )
    figures = {}
    for name, spent in sorted(times.items(), key=lambda pair: median(pair[1])):
        row = {"median": median(spent), "fastest": min(spent), "threads": median(spent_by_threads[name])}
        row |= {"speed": base / median(spent), "error": errors[name]}
        figures[name] = {key: float(f"{value:.4g}") for key, value in row.items()}
        seconds = [f"{row[key]:.3f}" for key in ("median", "fastest", "threads")]
        cells = (*seconds, f"{row['speed']:.2f}", f"{row['error']:.1e}")
        table.add_row(name, *cells)
    Console().print(table)
    if save_results:
        conditions = (
            f"seconds, medians of {rounds} runs in turns, {tiles} tiles of {config.tile_size} pixels, tower and "
            f"projector of GAR-1B with {depth} of 23 blocks, random weights; threads: seconds of all together; speed "
            f"is that of {BASE} by medians; errors relative to its largest value"
        )
        print(save("vision", figures, conditions))


def random_encoder(config: GARConfig) -> RegionEncoder:
    """An encoder whose values stay of one size from block to block."""
    torch.manual_seed(0)
    encoder = RegionEncoder(config).eval().requires_grad_(requires_grad=False)
    for name, parameter in encoder.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        elif "gamma" in name:
            parameter.fill_(0.3)
    return encoder


def _torch(encoder: RegionEncoder) -> dict[str, tuple[str, Features]]:
    """The tower as it is, with attention spelled out, and in bfloat16."""
    half = RegionEncoder(encoder.config).eval().to(torch.bfloat16)
    half.load_state_dict(encoder.state_dict())
    half.reset_buffers(torch.bfloat16)

    def run(model: RegionEncoder, plain: bool = False) -> Features:
        def features(sample: Tiles) -> torch.Tensor:
            with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
                return model.features(sample.tiles, pack_mask(sample.masks.bool()))

        return features

    return {
        BASE: ("fp32", run(encoder)),
        "torch eager fp32": ("fp32", run(encoder, plain=True)),
        "torch SDPA bf16": ("bf16", run(half)),
    }


def _onnx(encoder: RegionEncoder, folder: Path) -> dict[str, tuple[str, Features]]:
    """The exported tower at two opsets, fused further, in 8 bits, and on other CPU providers that are installed."""
    import onnxruntime
    from garserve.export.fuse import fuse_operators

    peers: dict[str, tuple[str, Features]] = {}

    def add(name: str, dtype: str, path: Path, provider: str = "CPU") -> None:
        session = OnnxVision(path, provider=provider)
        peers[name] = (dtype, lambda sample: session.run(sample.tiles, sample.masks))

    for opset in (18, 23):
        write_graph(encoder, folder / str(opset) / "vision.onnx", _info(encoder, "fp32", opset))
        add(f"onnxruntime fp32, opset {opset}", "fp32", folder / str(opset))
    if "OpenVINOExecutionProvider" in onnxruntime.get_available_providers():
        add("OpenVINO fp32", "fp32", folder / "18", "OpenVINO")
    for name, dtype in (("fused", "fp32"), ("int8", "int8")):
        path = folder / name / "vision.onnx"
        info = _info(encoder, dtype, 23)
        write_graph(encoder, path, replace(info, dtype="fp32"))
        if name == "int8":
            quantise(path, info)
        else:
            fuse_operators(path)
        add(f"onnxruntime {name}", dtype, path)
    return peers


def _info(encoder: RegionEncoder, dtype: str, opset: int) -> ModelInfo:
    return ModelInfo("vision", "", "", dtype, opset, LIMITS[dtype], vision_settings(encoder.config))


def _compared(peers: dict[str, tuple[str, Features]], sample: Tiles) -> dict[str, float]:
    """Return each peer's error. Raises SystemExit where one is too far from torch in float32."""
    wanted = peers[BASE][1](sample).float()
    errors: dict[str, Any] = {}
    for name, (dtype, run) in peers.items():
        errors[name] = relative_error(run(sample).float(), wanted)
        if not errors[name] <= LIMITS[dtype]:
            raise SystemExit(f"vision: {name}: error {errors[name]:.1e}, limit {LIMITS[dtype]:g}: no figures")
    return errors


if __name__ == "__main__":
    typer.run(main)
