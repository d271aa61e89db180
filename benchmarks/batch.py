"""`garserve batch` on the tiny checkpoint: one region at a time, in groups, and by a loop of `describe` calls.

`python benchmarks/batch.py` takes the packaged evaluation's pictures with 20 regions each, whose true attributes are
computed by tools/train_tiny. The loop describes the first regions only (`--loop`, 60 of them), and no figures are
printed where its texts differ from the batch's. All take turns, one run of each makes a round, and medians of the
rounds are printed.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from machine import save
from prompt_tokens import BLOCK, REGIONS, released_shape
from rich.console import Console
from rich.table import Table
from warm_runs import MAX_TOKENS, Data, Loop, Run, run_batch, run_loop

from garserve.batch.grouping import GAP
from garserve.batch.prepare import encoded
from garserve.batch.totals import Totals
from garserve.evaluation.questions import PACKAGED
from garserve.evaluation.score import described
from garserve.inputs.images import load_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools" / "train_tiny"))
import attributes
import shapes

ATTRIBUTES = ("colour", "size", "position")
FORMS = {  # size of a group, least distance of its regions
    "group 1": (1, GAP),
    "group 4": (4, GAP),
    "group 4, gap 0": (4, 0.0),
    "group 5, gap 0": (5, 0.0),
}

_RATIOS, _COUNTED = "regions/s against the loop of describe", "GAR-1B, tokens counted"


def main(
    pictures: Annotated[int, typer.Option(min=1, help="Pictures of 20 regions each.")] = 20,
    loop: Annotated[
        int, typer.Option(min=1, help="Regions that the loop of describe calls is timed over, and compared on.")
    ] = 60,
    block: Annotated[
        int, typer.Option(min=1, help="Tokens of a KV block; what is shared is shared in whole blocks.")
    ] = 32,
    workers: Annotated[int, typer.Option(min=1, help="Processes that prepare.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each, one after the other in turns.")] = 3,
    save_results: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/.../batch.json.")] = False,
) -> None:
    """Run the forms and the loop in turns, and print them side by side."""
    runs: dict[str, list[Run]] = {name: [] for name in FORMS}
    loops: list[Loop] = []
    with tempfile.TemporaryDirectory() as folder:
        data = _data(Path(folder), pictures)
        ids = list(data.truth)[:loop]
        for number in range(rounds):
            for name, form in FORMS.items():
                runs[name].append(run_batch(data, Path(folder) / f"{name} {number}.jsonl", form, block, workers))
            loops.append(run_loop(data, ids, block))
            _compare(runs["group 1"][-1], loops[-1])
    figures: dict[str, Any] = {name: _figures(made, data) for name, made in runs.items()}
    figures["loop of describe"] = {"regions": len(ids), **_rates(loops)}
    figures[_RATIOS] = {name: _ratio([run.totals for run in made], loops) for name, made in runs.items()}
    figures[_COUNTED] = released_shape({name: made[0].sizes.values() for name, made in runs.items()})
    _print(figures)
    if save_results:
        conditions = (
            f"tiny checkpoint in vLLM on the CPU, {pictures} pictures of {REGIONS} regions, descriptions of at most "
            f"{MAX_TOKENS} tokens, KV blocks of {block} tokens, {workers} preparing processes beside the engine; the "
            f"loop calls Engine.describe for one region at a time, over the first {len(ids)} regions, whose texts are "
            f"the batch's. Medians of {rounds} runs in turns, and of the ratios of each round; what is true is that of "
            "the first. Each run has an engine of its own, which is warmed, as the workers are, by a region of another "
            "picture; the time of all is from before the first region is prepared to the last answer. "
            f"A group's regions lie {GAP} of the picture apart, or only do not overlap (gap 0). "
            f"GAR-1B: prompts of its shape for {REGIONS} regions of a picture of 16 tiles, KV blocks of {BLOCK} "
            "tokens, in groups of one size, and in the sizes that the pictures' groups have; nothing run."
        )
        print(save("batch", {"tower": loops[0].tower} | figures, conditions))


def _compare(batch: Run, loop: Loop) -> None:
    wrong = [identity for identity, text in loop.texts.items() if batch.texts[identity] != text]
    if wrong:
        raise SystemExit(
            f"{len(wrong)} of {len(loop.texts)} texts differ between batch and loop ({wrong[0]}): no figures"
        )


def _data(folder: Path, count: int) -> Data:
    """Write requests about regions of random shapes on the evaluation's pictures, with the labels of their pixels."""
    lines, truth = [], {}
    for path in sorted((PACKAGED / "images").iterdir())[:: max(len(list((PACKAGED / "images").iterdir())) // count, 1)]:
        image = load_image(path)
        rng = np.random.default_rng(len(truth))
        for number in range(REGIONS):
            mask = _mask(rng, image)
            identity = f"{path.stem}/{number}"
            truth[identity] = {
                name: word for name in ATTRIBUTES if (word := getattr(attributes.labels(image, mask), name)) is not None
            }
            lines.append({"id": identity, "image": str(path), "regions": [{"rle": encoded(mask)}]})
        if len(truth) >= count * REGIONS:
            break
    target = folder / "requests.jsonl"
    target.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Data(target, truth)


def _mask(rng: np.random.Generator, image: Any) -> Any:
    height, width = image.shape[:2]
    while True:
        mask = shapes.random_shape(rng, height, width, shapes.random_area(rng, 0.004, 0.15))
        if mask.sum() >= 0.002 * mask.size:
            return mask


def _figures(runs: Sequence[Run], data: Data) -> dict[str, Any]:
    """Return the medians of one form's runs; its texts, and what they say, are those of the first."""
    right = {name: [0, 0] for name in ATTRIBUTES}
    for identity, words in data.truth.items():
        for name, word in words.items():
            right[name][0] += described(name, runs[0].texts[identity]) == word
            right[name][1] += 1
    all_totals, sizes = [run.totals for run in runs], runs[0].sizes
    prefilled = median(totals.prompt_tokens - totals.cached_tokens for totals in all_totals)
    hits, count = (sum(pair[i] for pair in right.values()) for i in (0, 1))
    regions = all_totals[0].regions
    return {
        "regions": regions,
        "mean_group": round(len(sizes) / sum(1 / size for size in sizes.values()), 2),
        **_rates(all_totals),
        "prompt_tokens_per_region": round(all_totals[0].prompt_tokens / regions, 1),
        "prefilled_tokens_per_region": round(prefilled / regions, 1),
        "tiles_reused": round(median(totals.tile_hit_rate or 0.0 for totals in all_totals), 3),
        "engine_waited_for_input": round(median(totals.idle_share for totals in all_totals), 4),
        "true_attributes": {name: f"{100 * a / b:.1f} % of {b}" for name, (a, b) in right.items()},
        "true_attributes_all": round(100 * hits / count, 2),
    }


def _rates(runs: Sequence[Totals | Loop]) -> dict[str, Any]:
    rates = [run.regions_per_second for run in runs]
    return {"regions_per_second": round(median(rates), 2), "rounds": [round(rate, 2) for rate in rates]}


def _ratio(batches: Sequence[Totals], loops: Sequence[Loop]) -> dict[str, Any]:
    pairs = zip(batches, loops, strict=True)
    ratios = [batch.regions_per_second / loop.regions_per_second for batch, loop in pairs]
    return {"median": float(f"{median(ratios):.3g}"), "rounds": len(ratios)}


def _print(figures: dict[str, dict[str, Any]]) -> None:
    shown = {name: values for name, values in figures.items() if name not in (_RATIOS, _COUNTED)}
    table = Table("", *shown)
    for key in next(iter(shown.values())):
        table.add_row(key, *(str(values.get(key, "")) for values in shown.values()))
    console = Console()
    console.print(table)
    for name, ratio in figures[_RATIOS].items():
        told = f"{ratio['median']} x regions/s, median of {ratio['rounds']} rounds in turns"
        console.print(f"{name} against the loop of describe: {told}")
    one = figures["group 1"]
    for name in list(FORMS)[1:]:
        ratio = one["prefilled_tokens_per_region"] / figures[name]["prefilled_tokens_per_region"]
        points = figures[name]["true_attributes_all"] - one["true_attributes_all"]
        console.print(f"{name} against one by one: {ratio:.2f} x fewer prefilled tokens, {points:+.2f} points of truth")
    console.print(f"at GAR-1B's shape, prefilled tokens a region: {figures[_COUNTED]}")


if __name__ == "__main__":
    typer.run(main)
