"""Answers a second, end to end: garserve against the authors' algorithm and against a careful user's batch.

`python benchmarks/end_to_end.py` takes the tiny checkpoint; `--model GAR-1B --depth 2 --layers 1` makes random weights
of that shape with fewer blocks and layers. Runs take turns, one of each makes a round, and medians of the rounds'
ratios are printed; a round before them warms everyone up. The peers answer only some of a workload's requests in each
round, for every one of them costs the same. No ratio is printed where greedy tokens differ.
"""

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import typer
from machine import add, origin
from peers.answers import Peers, PeersApart
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sides import Side, compare, rates_and_ratios, time_side, told

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

# What a title leaves out, for other figures say so in theirs; the batch is of whole groups (`_usual_batch`).
_MAX_TOKENS, _PEER_REGIONS, _LEAST_BATCH = 48, 5, 4
_SIZES = {"tiny": (640, 480), "GAR-1B": (1792, 1792)}
console = Console()


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
    peer_regions: Annotated[int, typer.Option(min=1, help="Requests that a peer answers in a round.")] = _PEER_REGIONS,
    batch: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Batch size of the careful user, a multiple of --group; 0 leaves the peer out (default: the least one "
            f"from {_LEAST_BATCH} on).",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = _MAX_TOKENS,
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
    batch = _chosen_batch(batch, group)
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
                time_side(side, asked.requests, group, counted=number > 0)
            compare(sides)
            after = engine.tile_counts
            if number:
                limits.append(_flops(engine, known, tiles, after.computed - before.computed))
        tower = runtime(engine).tower
    where = "in a process of their own, with torch's OpenMP" if apart else "in garserve's process, with its OpenMP"
    entry = {"tower": tower, "peers": where, **rates_and_ratios(sides), **_bound(limits)}
    cuts = {"depth": depth, "layers": layers}
    title = _title(plan, cuts, peer_regions=peer_regions, batch=batch, tile_reuse=tile_reuse, apart=apart)
    conditions = _conditions(plan, sides, len(asked.requests))
    _print(title, {"conditions": conditions, **origin(), **entry})
    if save_results:
        print(add("end_to_end", title, entry, conditions))


def _title(
    plan: Rounds, cuts: dict[str, int | None], *, peer_regions: int, batch: int, tile_reuse: bool, apart: bool
) -> str:
    """Name a comparison by all that its figures depend on: those of another one do not take its place in a file."""
    parts = [plan.model, f"{plan.kind} of {plan.regions}" if plan.kind == "dense" else plan.kind]
    parts.append(f"groups of {plan.group}")
    parts += [f"{plan.images} images"] if plan.images > 1 else []
    parts += [f"{name} {cut}" for name, cut in cuts.items() if cut is not None]
    parts += [] if plan.max_tokens == _MAX_TOKENS else [f"at most {plan.max_tokens} tokens"]
    parts += [] if peer_regions == _PEER_REGIONS else [f"peers answer {peer_regions}"]
    parts += [] if batch == _usual_batch(plan.group) else [f"batches of {batch}" if batch else "no careful batch"]
    parts += [] if tile_reuse else ["no tile kept"]
    parts += [] if apart else ["peers in garserve's process"]
    return ", ".join(parts)


def _conditions(plan: Rounds, sides: Sequence[Side], count: int) -> str:
    """Say under which conditions figures were made; a round has `count` requests."""
    width, height = _SIZES[plan.model]
    return (
        f"float32, greedy, equal tokens, at most {plan.max_tokens} of an answer; pictures of {width}x{height}; rates "
        "are answers a second, ratios medians of those of each round; vLLM with KV blocks of 32 tokens; of a round's "
        f"{count} requests: {'; '.join(told(side, count) for side in sides)}"
    )


def _usual_batch(group: int) -> int:
    """Return the least batch, from `_LEAST_BATCH` on, of which no group is cut."""
    return -(-_LEAST_BATCH // group) * group


def _chosen_batch(batch: int | None, group: int) -> int:
    """Return the batch size that was given, or the usual one. Raises typer.BadParameter where it would cut groups."""
    if batch is None:
        return _usual_batch(group)
    if batch % group:
        raise typer.BadParameter(f"--batch: expected a multiple of --group {group}, whose masks are one, got {batch}")
    return batch


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

    sides = [Side("garserve", ours, None), Side("upstream", peers.upstream, peer_regions, 1)]
    if not batch:
        return sides
    return [*sides, Side("careful batch", batched, -(-peer_regions // batch) * batch, batch)]


def _flops(engine: garserve.Engine, known: Sequence[tuple[int, int]], tiles: int, computed: int) -> dict[str, float]:
    """Count a request's FLOPs: the authors' tower and prefill, and what is left of both in garserve."""
    config, count = engine.processor.config, len(known)
    return {
        "tower, upstream": tiles * tile_flops(config),
        "prefill, upstream": sum(prefill_flops(config, tokens) for tokens, _ in known) / count,
        "tower, garserve": computed * tile_flops(config) / count,
        "prefill, garserve": sum(prefill_flops(config, tokens, cached) for tokens, cached in known) / count,
    }


def _bound(limits: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return what FLOPs alone allow: medians of the rounds' counts."""
    flops = {name: median(limit[name] for limit in limits) for name in limits[0]}
    upstream = flops["prefill, upstream"] + flops["tower, upstream"]
    ours_in_all = flops["prefill, garserve"] + flops["tower, garserve"]
    bound = {
        "ratio of FLOPs, decode left out": float(f"{upstream / ours_in_all:.3g}"),
        "ratio if garserve did nothing but its prefill": float(f"{upstream / flops['prefill, garserve']:.3g}"),
        "seconds an answer at the measured peak": {
            "upstream": float(f"{upstream / peaks().flops:.3g}"),
            "garserve": float(f"{ours_in_all / peaks().flops:.3g}"),
        },
    }
    return {
        "TFLOP a request": {name: float(f"{value / 1e12:.4g}") for name, value in flops.items()},
        "bound": bound,
    }


def _print(title: str, entry: dict[str, Any]) -> None:
    table = Table("", "", title=title)
    for name, value in entry.items():
        table.add_row(name, escape(value if isinstance(value, str) else json.dumps(value)))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
