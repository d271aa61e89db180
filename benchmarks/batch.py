"""`garserve batch` on the tiny checkpoint: one region at a time, in groups, and by a loop of `describe` calls.

`python benchmarks/batch.py` takes the packaged evaluation's pictures with 20 regions each, whose true attributes are
computed by tools/train_tiny. The loop describes the first regions only (`--loop`, 60 of them), and no figures are
printed where its texts differ from the batch's.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from machine import save
from rich.console import Console
from rich.table import Table

import garserve
from garserve.batch.grouping import GAP
from garserve.batch.limits import Limits
from garserve.batch.prepare import Preparation, encoded
from garserve.batch.run import Plan, run_job
from garserve.batch.totals import Totals
from garserve.bench.runtime import runtime
from garserve.checkpoint import TINY, resolve
from garserve.evaluation.questions import PACKAGED
from garserve.evaluation.score import described
from garserve.inputs.images import load_image
from garserve.inputs.processor import PreparedRequest
from garserve.inputs.request import RegionRequest
from garserve.model.random_checkpoint import write_files
from garserve.presets import preset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools" / "train_tiny"))
import attributes
import shapes

REGIONS = 20  # of each picture
ATTRIBUTES = ("colour", "size", "position")
FORMS = {  # size of a group, least distance of its regions
    "group 1": (1, GAP),
    "group 4": (4, GAP),
    "group 4, gap 0": (4, 0.0),
}
_BLOCK = 16  # tokens of a KV block of vLLM on a GPU


@dataclass(frozen=True)
class Data:
    """A requests file and what is true of each of its regions, by id."""

    path: Path
    truth: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Run:
    """What a job did."""

    totals: Totals
    texts: dict[str, str]
    sizes: dict[str, int]  # of the group that each region was asked in


def main(
    pictures: Annotated[int, typer.Option(min=1, help="Pictures of 20 regions each.")] = 20,
    loop: Annotated[
        int, typer.Option(min=1, help="Regions that the loop of describe calls is timed over, and compared on.")
    ] = 60,
    block: Annotated[
        int, typer.Option(min=1, help="Tokens of a KV block; what is shared is shared in whole blocks.")
    ] = 32,
    workers: Annotated[int, typer.Option(min=1, help="Processes that prepare.")] = 1,
    save_results: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/.../batch.json.")] = False,
) -> None:
    """Run both forms and the loop, and print them side by side."""
    with tempfile.TemporaryDirectory() as folder:
        data = _data(Path(folder), pictures)
        runs = {
            name: _batch(data, Path(folder) / f"{name}.jsonl", form, block, workers) for name, form in FORMS.items()
        }
        ids = list(data.truth)[:loop]
        texts, seconds, tower = _describe_loop(data, ids, block)
        wrong = [one for one, text in texts.items() if runs["group 1"].texts[one] != text]
        if wrong:
            raise SystemExit(
                f"{len(wrong)} of {len(texts)} texts differ between batch and loop ({wrong[0]}): no figures"
            )
    figures: dict[str, Any] = {name: _figures(run, data) for name, run in runs.items()}
    figures["loop of describe"] = {"regions": len(ids), "regions_per_second": round(len(ids) / seconds, 2)}
    figures["GAR-1B, tokens counted"] = _released_shape(runs)
    _print(figures)
    if save_results:
        conditions = (
            f"tiny checkpoint in vLLM on the CPU, {pictures} pictures of {REGIONS} regions, descriptions, KV blocks of "
            f"{block} tokens, {workers} preparing processes beside the engine; the loop calls Engine.describe for one "
            f"region at a time, over the first {len(ids)} regions, whose texts are the batch's. A group's regions lie "
            f"{GAP} of the picture apart, or only do not overlap (gap 0). "
            f"GAR-1B: prompts of its shape for {REGIONS} regions of a picture of 16 tiles, KV blocks of {_BLOCK} "
            f"tokens, in groups of one size, and in the sizes that the pictures' groups have; nothing run."
        )
        print(save("batch", {"tower": tower} | figures, conditions))


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


def _batch(data: Data, output: Path, form: tuple[int, float], block: int, workers: int) -> Run:
    group, gap = form
    plan = Plan(
        input=data.path,
        output=output,
        preparation=Preparation(str(resolve(TINY)), group=group, group_gap=gap, max_tokens=48),
        limits=Limits(),
        workers=workers,
    )
    totals = run_job(plan, lambda: garserve.load(block_size=block))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    if any("error" in row for row in rows) or len(rows) != len(data.truth):
        raise SystemExit(f"group {group}: {totals.errors} errors, {len(rows)} of {len(data.truth)} rows: no figures")
    sizes = {row["id"]: int(row["form"].removeprefix("group of ")) if group > 1 else 1 for row in rows}
    return Run(totals, {row["id"]: row["text"] for row in rows}, sizes)


def _describe_loop(data: Data, ids: list[str], block: int) -> tuple[dict[str, str], float, str]:
    """Describe regions one call at a time, and return the texts, the seconds, and where the tower ran."""
    lines = {line["id"]: line for line in map(json.loads, data.path.read_text().splitlines())}
    texts = {}
    with garserve.load(block_size=block) as engine:
        engine.describe(lines[ids[-1]]["image"], lines[ids[-1]]["regions"], max_tokens=48)  # warm
        start = time.perf_counter()
        for identity in ids:
            line = lines[identity]
            texts[identity] = engine.describe(line["image"], line["regions"], max_tokens=48)[0].text
        return texts, time.perf_counter() - start, runtime(engine).tower


def _figures(run: Run, data: Data) -> dict[str, Any]:
    right = {name: [0, 0] for name in ATTRIBUTES}
    for identity, words in data.truth.items():
        for name, word in words.items():
            right[name][0] += described(name, run.texts[identity]) == word
            right[name][1] += 1
    totals = run.totals
    prefilled = totals.prompt_tokens - totals.cached_tokens
    hits, count = (sum(pair[i] for pair in right.values()) for i in (0, 1))
    return {
        "regions": totals.regions,
        "mean_group": round(len(run.sizes) / sum(1 / size for size in run.sizes.values()), 2),
        "regions_per_second": round(totals.regions_per_second, 2),
        "prompt_tokens_per_region": round(totals.prompt_tokens / totals.regions, 1),
        "prefilled_tokens_per_region": round(prefilled / totals.regions, 1),
        "tiles_reused": round(totals.tile_hit_rate or 0.0, 3),
        "engine_waited_for_input": round(totals.idle_share, 4),
        "true_attributes": {name: f"{100 * a / b:.1f} % of {b}" for name, (a, b) in right.items()},
        "true_attributes_all": round(100 * hits / count, 2),
    }


def _released_shape(runs: dict[str, Run]) -> dict[str, Any]:
    """Count the tokens that have to be prefilled for a region of 20 in one picture at GAR-1B's shape."""
    with tempfile.TemporaryDirectory() as folder:
        config, preprocessor = preset("GAR-1B")
        write_files(Path(folder), config, preprocessor, "")
        processor = Preparation(folder).processor()
    image = np.random.default_rng(0).integers(0, 255, (1792, 1792, 3)).astype(np.uint8)
    boxes = [{"box": [80 * i, 70 * i, 80 * i + 150, 70 * i + 200]} for i in range(REGIONS)]
    figures: dict[str, Any] = {}
    for group in (1, 2, 3, 4, 5):
        requests = []
        for start in range(0, REGIONS, group):
            regions = boxes[start : start + group]
            whole = RegionRequest(image, regions, "q")
            for number in range(len(regions)):
                question = f"Describe <Prompt{number}> in detail."
                request = (
                    RegionRequest(image, regions) if group == 1 else replace(whole, question=question, focus=[number])
                )
                requests.append(processor(request))
        figures[f"all in groups of {group}"] = round(_prefilled(requests) / REGIONS, 1)
    alone = figures["all in groups of 1"]
    for name, run in runs.items():
        mean = np.mean([figures[f"all in groups of {size}"] for size in run.sizes.values()])
        figures[f"{name}, as here"] = f"{mean:.1f} ({alone / mean:.2f} x fewer)"
    return figures


def _prefilled(requests: list[PreparedRequest]) -> int:
    """Count the tokens beyond the longest prefix, in whole blocks, that an earlier request has in common."""
    known: set[bytes] = set()
    total = 0
    for prepared in requests:
        # A placeholder stands for its item: positions of other items are other tokens.
        tokens: list[Any] = list(prepared.token_ids)
        for item, (start, stop) in zip(prepared.items, prepared.spans, strict=True):
            tokens[start:stop] = [item.hash] * (stop - start)
        blocks = [json.dumps(tokens[:end]).encode() for end in range(_BLOCK, len(tokens), _BLOCK)]
        hits = next((i for i, prefix in enumerate(blocks) if prefix not in known), len(blocks))
        total += len(tokens) - hits * _BLOCK
        known.update(blocks)
    return total


def _print(figures: dict[str, dict[str, Any]]) -> None:
    table = Table("", *(name for name in figures if not name.startswith("GAR")))
    shown = [values for name, values in figures.items() if not name.startswith("GAR")]
    for key in shown[0]:
        table.add_row(key, *(str(values.get(key, "")) for values in shown))
    console = Console()
    console.print(table)
    one, loop = figures["group 1"], figures["loop of describe"]
    console.print(f"batch against the loop: {one['regions_per_second'] / loop['regions_per_second']:.1f} x regions/s")
    for name in list(FORMS)[1:]:
        ratio = one["prefilled_tokens_per_region"] / figures[name]["prefilled_tokens_per_region"]
        points = figures[name]["true_attributes_all"] - one["true_attributes_all"]
        console.print(f"{name} against one by one: {ratio:.2f} x fewer prefilled tokens, {points:+.2f} points of truth")
    console.print(f"at GAR-1B's shape, prefilled tokens a region: {figures['GAR-1B, tokens counted']}")


if __name__ == "__main__":
    typer.run(main)
