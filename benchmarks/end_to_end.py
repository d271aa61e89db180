"""Answers a second, end to end: garserve against the authors' algorithm and against a careful user's batch.

`python benchmarks/end_to_end.py` takes the tiny checkpoint; `--model GAR-1B --depth 2 --layers 1` makes random weights
of that shape with fewer blocks and layers. Runs take turns, one of each makes a round, and medians of the rounds'
ratios are printed; a round before them warms everyone up. The peers answer only some of a workload's requests in each
round, for every one of them costs the same. No ratio is printed where greedy tokens differ.
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
from machine import add
from peers.answers import Peers, PeersApart
from rich.console import Console
from rich.table import Table

import garserve
from garserve.bench.cost import prefill_flops, tile_flops
from garserve.bench.kinds import HELP, Kind
from garserve.bench.machine import peaks
from garserve.bench.runtime import runtime
from garserve.bench.workload import DENSE, Workload, make_workload
from garserve.checkpoint import Checkpoint, resolve
from garserve.inputs.request import RegionRequest
from garserve.inputs.tiles import choose_grid
from garserve.model.random_checkpoint import write_random_checkpoint

_CONDITIONS = (
    "float32, greedy, equal tokens; rates are answers a second, ratios medians of those of each round; vLLM with KV "
    "blocks of 32 tokens; upstream: one request at a time, careful batch: whole batches of neighbouring requests"
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


@dataclass(frozen=True)
class Rounds:
    """What is asked in each round: images that no other round has, and the same regions on them."""

    kind: Kind
    model: Literal["tiny", "GAR-1B"]
    images: int
    regions: int  # of a dense image
    group: int
    max_tokens: int

    def asked(self, number: int) -> Workload:
        """Return the requests of one round."""
        return self._made(number, self.images, self.regions)

    def warming(self, least: int) -> Workload:
        """Return what everyone is warmed up by: a whole round, or at GAR-1B's size, where it takes minutes, a part.

        The part has at least `least` requests and only whole groups, or is all that there is about an image.
        """
        if self.model == "tiny":
            return self.asked(0)
        needed = max(least, self.group)
        regions = min(self.regions, -(-needed // self.group) * self.group)
        images = 1 if self.kind in ("dense", "questions") else min(self.images, needed)
        return self._made(0, images, regions)

    def _made(self, number: int, images: int, regions: int) -> Workload:
        many = {"first": number * self.images, "regions": regions, "group": self.group, "max_tokens": self.max_tokens}
        return make_workload(self.kind, images, _SIZES[self.model], **many)


def main(
    model: Annotated[Literal["tiny", "GAR-1B"], typer.Option(help="Checkpoint.")] = "tiny",
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks of the tower (GAR-1B: 23).")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the decoder (GAR-1B: 16).")] = None,
    workload: Annotated[Kind, typer.Option(help=HELP)] = "dense",
    regions: Annotated[int | None, typer.Option(min=1, help=f"Regions of a dense image (default: {DENSE}).")] = None,
    group: Annotated[int, typer.Option(min=1, max=5, help="Regions that share a mask; the peers ask alike.")] = 1,
    images: Annotated[int, typer.Option(min=1, help="Images of a round; no round has those of another.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that are counted.")] = 5,
    peer_regions: Annotated[int, typer.Option(min=1, help="Requests that a peer answers in a round.")] = 5,
    batch: Annotated[int, typer.Option(min=0, help="Batch size of the careful user; 0 leaves the peer out.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 48,
    tile_reuse: Annotated[bool, typer.Option(help="Without: what vLLM's own features give, no tile kept.")] = True,
    apart: Annotated[
        bool, typer.Option("--apart/--together", help="Peers in a process of their own, with torch's OpenMP, or here.")
    ] = True,
    save_results: Annotated[
        bool, typer.Option("--save", help="Add the rounds to benchmarks/results/.../end_to_end.json.")
    ] = False,
) -> None:
    """Compare and print."""
    _refuse_ignored(model, workload, depth=depth, layers=layers, regions=regions)
    plan = Rounds(workload, model, images, regions or DENSE, group, max_tokens)
    with ExitStack() as stack:
        folder = _checkpoint(model, depth, layers, stack)
        checkpoint = Checkpoint.open(folder)
        peers = PeersApart(folder) if apart else Peers(folder)
        width, height = _SIZES[model]
        engine = stack.enter_context(
            garserve.load(folder, dtype="float32", block_size=32, tile_cache_gb=0.5 if tile_reuse else 0.0)
        )
        known: list[tuple[int, int]] = []
        sides = _sides(peers, engine, known, peer_regions, batch)
        limits = []
        across, down = choose_grid(width, height, engine.processor.max_num_tiles, checkpoint.config.tile_size)
        tiles = 1 + across * down
        for number in range(rounds + 1):  # the first one warms up, and is not counted
            asked = plan.asked(number) if number else plan.warming(max(side.share or 1 for side in sides))
            before = engine.tile_counts
            for side in sides:
                _time(side, asked.requests, group, counted=number > 0)
            _compare(sides, asked.requests)
            after = engine.tile_counts
            if number:
                limits.append(_flops(engine, known, tiles, after.computed - before.computed))
        tower = runtime(engine).tower
    figures = _figures(sides, limits)
    title = f"{model}, {workload}{f' of {plan.regions}' if workload == 'dense' else ''}, groups of {group}"
    title += f", {images} images" if images > 1 else ""
    title += "".join(f", {name} {cut}" for name, cut in (("depth", depth), ("layers", layers)) if cut is not None)
    title += "" if tile_reuse else ", no tile kept"
    title += "" if apart else ", peers in garserve's process"
    _print(title, figures)
    if save_results:
        where = "in a process of their own, with torch's OpenMP" if apart else "in garserve's process"
        print(add("end_to_end", title, {"tower": tower, "peers": where, **figures}, _CONDITIONS))


def _refuse_ignored(model: str, workload: Kind, *, depth: int | None, layers: int | None, regions: int | None) -> None:
    """Raise typer.BadParameter for an option that would do nothing."""
    for name, cut in (("--depth", depth), ("--layers", layers)):
        if cut is not None and model == "tiny":
            raise typer.BadParameter(f"{name}: expected it with --model GAR-1B only; tiny is never cut")
    if regions is not None and workload != "dense":
        raise typer.BadParameter(f"--regions: expected it with --workload dense only, got {workload}")


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


def _time(side: Side, requests: Sequence[RegionRequest], group: int, *, counted: bool) -> None:
    taken = _taken(side, len(requests), group)
    start_time = time.perf_counter()
    tokens = side.run([requests[position] for position in taken])
    seconds = time.perf_counter() - start_time
    side.tokens = dict(zip(taken, tokens, strict=True))
    if counted:
        side.rates.append(len(taken) / seconds)


def _taken(side: Side, count: int, group: int) -> list[int]:
    """Return the positions of the requests that a side answers: neighbours from a group's first on, moving on."""
    if side.share is None or side.share >= count:
        return list(range(count))
    start = (len(side.rates) * side.share) % (count - side.share + 1)
    start -= start % group  # a careful user's batch is a group, not parts of two
    return list(range(start, start + side.share))


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
    figures: dict[str, Any] = {side.name: {"answers/s": [float(f"{r:.4g}") for r in side.rates]} for side in sides}
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
        "seconds an answer at the measured peak": {
            "upstream": float(f"{upstream / peaks().flops:.3g}"),
            "garserve": float(f"{ours_in_all / peaks().flops:.3g}"),
        },
    }
    return figures


def _print(title: str, figures: dict[str, Any]) -> None:
    table = Table("", "", title=title)
    for name, values in figures.items():
        table.add_row(name, json.dumps(values))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
