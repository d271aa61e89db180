"""Regions a second, end to end: garserve against the authors' algorithm and against a careful user's batch.

`python benchmarks/end_to_end.py` takes the tiny checkpoint; `--model GAR-1B --depth 3 --layers 2` makes random weights
of that shape with fewer blocks and layers. Runs take turns, one of each makes a round, and medians of the rounds'
ratios are printed. The peers answer only some of a workload's regions in each round, for every one of them costs the
same. No ratio is printed where greedy tokens differ.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import typer
from machine import save, saved
from peers.answers import Peers, PeersApart
from rich.console import Console
from rich.table import Table

import garserve
from garserve.bench.cost import prefill_flops, tile_flops
from garserve.bench.machine import peaks, versions
from garserve.bench.workload import DENSE, make_workload
from garserve.checkpoint import Checkpoint, resolve
from garserve.inputs.request import RegionRequest
from garserve.inputs.tiles import choose_grid
from garserve.model.random_checkpoint import write_random_checkpoint

_CONDITIONS = (
    "float32, greedy, equal tokens; rates are requests a second, ratios medians of those of each round; vLLM with KV "
    "blocks of 32 tokens; upstream: one request at a time, careful batch: whole batches of one image"
)
_SIZES = {"tiny": (640, 480), "GAR-1B": (1792, 1792)}
console = Console()


@dataclass
class Side:
    """One of those compared: how it answers requests, how many it is given in a round, and what came of it."""

    name: str
    run: Callable[[Sequence[RegionRequest]], list[list[int]]]
    share: int | None  # requests of a round; None: all
    rates: list[float] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)  # by the request's position


def main(
    context: typer.Context,
    model: Annotated[Literal["tiny", "GAR-1B"], typer.Option(help="Checkpoint.")] = "tiny",
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks of the tower (GAR-1B: 23).")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the decoder (GAR-1B: 16).")] = None,
    workload: Annotated[Literal["dense", "five", "questions", "stream"], typer.Option()] = "dense",
    regions: Annotated[int, typer.Option(min=1, help="Regions of a dense image.")] = DENSE,
    group: Annotated[int, typer.Option(min=1, max=5, help="Regions that share a mask; the peers ask alike.")] = 1,
    images: Annotated[int, typer.Option(min=1, help="Images of a round; no round has those of another.")] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    peer_regions: Annotated[int, typer.Option(min=1, help="Requests that a peer answers in a round.")] = 5,
    batch: Annotated[int, typer.Option(min=0, help="Batch size of the careful user; 0 leaves the peer out.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1)] = 48,
    tile_reuse: Annotated[bool, typer.Option(help="Without: what vLLM's own features give, no tile kept.")] = True,
    apart: Annotated[
        bool, typer.Option("--apart/--together", help="Peers in a process of their own, with torch's OpenMP, or here.")
    ] = True,
    save_results: Annotated[
        bool, typer.Option("--save", help="Add the rounds to benchmarks/results/.../end_to_end.json.")
    ] = False,
) -> None:
    """Compare and print."""
    with ExitStack() as stack:
        folder = _checkpoint(model, depth, layers, stack)
        checkpoint = Checkpoint.open(folder)
        peers = PeersApart(folder) if apart else Peers(folder)
        width, height = size = _SIZES[model]
        engine = stack.enter_context(
            garserve.load(folder, dtype="float32", block_size=32, tile_cache_gb=0.5 if tile_reuse else 0.0)
        )
        known: list[tuple[int, int]] = []
        sides = _sides(peers, engine, known, peer_regions, batch)
        limits = []
        across, down = choose_grid(width, height, engine.processor.max_num_tiles, checkpoint.config.tile_size)
        tiles = 1 + across * down
        for number in range(rounds + 1):  # the first one warms up, and is not counted
            many = {"regions": regions if number else min(regions, group), "first": number * images}
            asked = make_workload(workload, images if number else 1, size, max_tokens=max_tokens, group=group, **many)
            before = engine.tile_counts
            for side in sides:
                _time(side, asked.requests, counted=number > 0)
            _compare(sides, asked.requests)
            after = engine.tile_counts
            if number:
                limits.append(_flops(engine, known, tiles, after.computed - before.computed))
    figures = _figures(sides, limits)
    title = f"{model}, {workload}{f' of {regions}' if workload == 'dense' else ''}, groups of {group}"
    title += f", {images} images" if images > 1 else ""
    title += "".join(f", {name} {cut}" for name, cut in (("depth", depth), ("layers", layers)) if cut is not None)
    title += "" if tile_reuse else ", no tile kept"
    title += "" if apart else ", peers in garserve's process"
    _print(title, figures)
    if save_results:
        where = "in a process of their own, with torch's OpenMP" if apart else "in garserve's process"
        entry = {"command": _command(context), "peers": where, "versions": versions(), **figures}
        print(save("end_to_end", {**saved("end_to_end"), title: entry}, _CONDITIONS))


def _checkpoint(model: str, depth: int | None, layers: int | None, stack: ExitStack) -> Path:
    if model == "tiny":
        return resolve("tiny")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    cut = {} if layers is None else {"num_hidden_layers": layers}
    return write_random_checkpoint(folder, "GAR-1B", box_scale="released", dtype="float32", depth=depth, **cut)


def _sides(
    peers: Peers | PeersApart, engine: garserve.Engine, known: list[tuple[int, int]], peer_regions: int, batch: int
) -> list[Side]:
    """Return those compared; garserve's leaves in `known` how many tokens each prompt had, and how many were cached."""

    def ours(requests: Sequence[RegionRequest]) -> list[list[int]]:
        answers = list(engine.describe_many(requests))
        known[:] = [(answer.prompt_tokens, answer.cached_tokens) for answer in answers]
        return [answer.token_ids for answer in answers]

    def batched(requests: Sequence[RegionRequest]) -> list[list[int]]:
        return peers.batched(requests, batch)

    sides = [Side("garserve", ours, None), Side("upstream", peers.upstream, peer_regions)]
    if not batch:
        return sides
    return [*sides, Side("careful batch", batched, -(-peer_regions // batch) * batch)]  # whole batches alone


def _time(side: Side, requests: Sequence[RegionRequest], *, counted: bool) -> None:
    taken = list(range(len(requests)))
    if side.share is not None and side.share < len(taken):
        # Requests side by side, so that a batch has one image; others in each round.
        start = (len(side.rates) * side.share) % (len(taken) - side.share + 1)
        taken = taken[start : start + side.share]
    start_time = time.perf_counter()
    tokens = side.run([requests[position] for position in taken])
    seconds = time.perf_counter() - start_time
    side.tokens = dict(zip(taken, tokens, strict=True))
    if counted:
        side.rates.append(len(taken) / seconds)


def _compare(sides: Sequence[Side], requests: Sequence[RegionRequest]) -> None:
    ours = sides[0].tokens
    for side in sides[1:]:
        wrong = [position for position, tokens in side.tokens.items() if tokens != ours[position]]
        if wrong:
            at = wrong[0]
            raise SystemExit(
                f"{side.name}: {len(wrong)} of {len(side.tokens)} answers differ from garserve's, the first of them "
                f"{side.tokens[at]} instead of {ours[at]}: no figures"
            )


def _flops(engine: garserve.Engine, known: Sequence[tuple[int, int]], tiles: int, computed: int) -> dict[str, float]:
    """Count a request's FLOPs: the authors' tower and prefill, and what is left of both in garserve."""
    config, count = engine.processor.config, len(known)
    return {
        "tower, upstream": tiles * tile_flops(config),
        "prefill, upstream": sum(prefill_flops(config, tokens) for tokens, _ in known) / count,
        "tower, garserve": computed * tile_flops(config) / count,
        "prefill, garserve": sum(prefill_flops(config, tokens, cached) for tokens, cached in known) / count,
    }


def _figures(sides: Sequence[Side], limits: Sequence[dict[str, float]]) -> dict[str, Any]:
    ours = sides[0].rates
    figures: dict[str, Any] = {side.name: {"regions/s": [float(f"{r:.4g}") for r in side.rates]} for side in sides}
    for side in sides[1:]:
        ratios = [mine / theirs for mine, theirs in zip(ours, side.rates, strict=True)]
        figures[f"garserve / {side.name}"] = {"median": float(f"{median(ratios):.3g}"), "rounds": len(ratios)}
    flops = {name: median(limit[name] for limit in limits) for name in limits[0]}
    upstream = flops["prefill, upstream"] + flops["tower, upstream"]
    ours_in_all = flops["prefill, garserve"] + flops["tower, garserve"]
    figures["TFLOP a request"] = {name: float(f"{value / 1e12:.4g}") for name, value in flops.items()}
    figures["bound"] = {
        "ratio of FLOPs, decode left out": float(f"{upstream / ours_in_all:.3g}"),
        "ratio if garserve did nothing but its prefill": float(f"{upstream / flops['prefill, garserve']:.3g}"),
        "seconds a region at the measured peak": {
            "upstream": float(f"{upstream / peaks().flops:.3g}"),
            "garserve": float(f"{ours_in_all / peaks().flops:.3g}"),
        },
    }
    return figures


def _command(context: typer.Context) -> str:
    """Return the command that this is, with every option that has another value than its default."""
    told = ["python benchmarks/end_to_end.py"]
    for option in context.command.params:
        value = context.params[str(option.name)]
        if option.name == "save_results" or value == option.default:
            continue
        names = option.opts if value is not False else option.secondary_opts
        told.append(names[0] if isinstance(value, bool) else f"{names[0]} {value}")
    return " ".join(told)


def _print(title: str, figures: dict[str, Any]) -> None:
    table = Table("", "", title=title)
    for name, values in figures.items():
        table.add_row(name, json.dumps(values))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
