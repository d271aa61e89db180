"""Figures from benchmarks/results: `python benchmarks/plot.py` writes a PNG and an SVG of each into docs/.

Needs the extra bench. What was not measured on a machine is left out.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("Agg")
_COLOURS = {"garserve": "#0072b2", "upstream": "#d55e00", "careful batch": "#e69f00"}
_LABELS = {"garserve": "garserve", "upstream": "authors' algorithm", "careful batch": "the same, in batches"}
_OURS, _PEERS = "#0072b2", ("#d55e00", "#e69f00", "#999999", "#009e73")
_STAGES = ("#009e73", "#56b4e9", "#0072b2", "#cc79a7", "#e69f00", "#d55e00", "#f0e442", "#999999", "#000000")
_SIZE = (5.2, 3.2)


def main(
    results: Annotated[Path | None, typer.Argument(help="A machine's folder (default: this machine's).")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the figures go.")] = Path("docs"),
) -> None:
    """Draw every figure whose results are there."""
    source = results or _own_results()
    figures: dict[str, tuple[str, Callable[[Axes, Any], None]]] = {
        "bench_regions": ("end_to_end", _regions),
        "bench_latency": ("latency", _latency),
        "bench_replay": ("replay_cpu", _replay),
        "bench_tiles": ("tiles_computed", _tiles),
    }
    for name, (data, draw) in figures.items():
        path = source / f"{data}.json"
        if not path.is_file():
            print(f"{name}: no {path}")
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        draw(axes, content["figures"])
        axes.spines[["top", "right"]].set_visible(False)
        machine = _machine(content)
        figure.supxlabel(f"{machine['cpu']}, {machine['threads']} threads", fontsize=6, color="#666666")
        for suffix in ("png", "svg"):
            figure.savefig(output / f"{name}.{suffix}", dpi=160, metadata={"Date": None} if suffix == "svg" else None)
        print(output / f"{name}.png")


def _own_results() -> Path:
    from machine import folder  # needs torch, which drawing does not

    return folder()


def _machine(content: dict[str, Any]) -> dict[str, Any]:
    """What a file says of the machine: once, or with every entry, which are all of one machine's folder."""
    found: dict[str, Any] = content.get("machine") or next(iter(content["figures"].values()))["machine"]
    return found


def _regions(axes: Axes, figures: dict[str, Any]) -> None:
    """Regions a second against regions of an image, tiny checkpoint, groups of 1."""
    found: dict[str, dict[int, float]] = {}
    for title, entry in figures.items():
        match = re.fullmatch(r"tiny, dense of (\d+), groups of 1", title)
        for name in _COLOURS if match else ():
            if match and name in entry:
                rates = entry[name].get("answers/s") or entry[name]["regions/s"]  # as older files call it
                found.setdefault(name, {})[int(match[1])] = median(rates)
    for name, points in found.items():
        places = sorted(points)
        axes.plot(places, [points[place] for place in places], "o-", label=_LABELS[name], color=_COLOURS[name])
    axes.set(xlabel="regions of an image", ylabel="regions a second", title="End to end, tiny", ylim=(0, None))
    axes.legend(frameon=False)


def _latency(axes: Axes, figures: list[dict[str, Any]]) -> None:
    """Where a request's time goes."""
    rows = [row for row in figures if "share" in row and row["stage"] != "E2E"]
    left = 0.0
    for row, colour in zip(rows, _STAGES, strict=False):
        axes.barh(
            [0], [row["milliseconds"]], left=left, color=colour, label=f"{row['stage']} {row['milliseconds']:.1f}"
        )
        left += row["milliseconds"]
    axes.set(xlabel="milliseconds", yticks=[], title="One request from pixels to text", ylim=(-0.6, 2.2))
    axes.legend(frameon=False, ncols=3, fontsize=7, loc="upper center")


def _replay(axes: Axes, figures: dict[str, Any]) -> None:
    """Time against number of regions, both axes logarithmic."""
    found: dict[str, dict[int, float]] = {}
    for title, entry in figures.items():
        match = re.fullmatch(r"float32, (\d+) regions", title)
        for name, value in entry.items() if match else ():
            if match:
                found.setdefault(name, {})[int(match[1])] = value
    for name, points in found.items():
        places, own = sorted(points), name == "ours"
        colour = _OURS if own else _PEERS[len(axes.lines) % len(_PEERS)]
        values = [points[place] for place in places]
        axes.plot(places, values, "o-", label="garserve" if own else name, linewidth=2.5 if own else 1, color=colour)
    axes.set(xscale="log", yscale="log", xlabel="regions", ylabel="milliseconds", title="Replay, float32, 16 tiles")
    axes.legend(frameon=False, fontsize=7)


def _tiles(axes: Axes, figures: dict[str, Any]) -> None:
    """Share of tiles that are computed against regions of an image."""
    for most, colour in ((8, "#56b4e9"), (16, "#0072b2"), (36, "#000000")):
        for key, style in (("computed", "o-"), ("five together", "o--")):
            points = {
                int(match[1]): entry[key]
                for title, entry in figures.items()
                if (match := re.fullmatch(rf"{most} tiles, (\d+) regions", title)) and key in entry
            }
            label = f"at most {most} tiles" if key == "computed" else f"{most}, five in one request"
            axes.plot(sorted(points), [points[place] for place in sorted(points)], style, color=colour, label=label)
    axes.set(xlabel="regions of an image", ylabel="share of all tiles", title="Tiles computed", ylim=(0, 1.05))
    axes.legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    typer.run(main)
