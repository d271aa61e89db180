"""Write held-out questions: `python tools/train_tiny/make_eval.py -o FOLDER`.

Or about photographs of your own with masks, `--masks FILE.jsonl`: lines {"image": path, "regions": [{"rle": …}, …]},
read as `garserve batch` reads them.
Labels are computed on the pixels as they were saved.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.random import Generator
from numpy.typing import NDArray
from pictures import HELD_OUT_PHOTOS, Picture, photograph, scene
from PIL import Image
from pycocotools import mask as rle_tools
from questions import Known, Question, about_many, about_none, about_one, about_two, describe, prompt

from garserve.bench.real import photographs
from garserve.errors import InputError

_SEEDS = {"scenes": 3, "photographs": 4, "own": 5}  # first numbers of the seeds; those of training are smaller
_ROUNDS = 40  # questions of each kind that are drawn for a picture, before most are left out
_MOST_REGIONS = 5


@dataclass
class Folder:
    """The folder that is written, and how many questions of each attribute and form it has for one split."""

    path: Path
    split: str
    per_kind: int
    per_picture: int
    seed: int = 0
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    pictures: int = 0

    def add(self, picture: Picture) -> None:
        """Save a picture and those questions about it that are still wanted."""
        buffer = io.BytesIO()
        Image.fromarray(picture.image).save(buffer, "JPEG", quality=90, subsampling=0)
        saved = np.asarray(Image.open(buffer).convert("RGB"))
        rng = np.random.default_rng([_SEEDS[self.split] + 10 * self.seed, self.pictures, 1])
        name = f"{self.split}_{self.pictures:04d}"
        self.pictures += 1
        wanted = self._wanted(_all_questions(Known.of(Picture(saved, picture.masks)), rng))
        rows = [self._row(f"{name}_{i:03d}", f"images/{name}.jpg", picture, *one) for i, one in enumerate(wanted)]
        if rows:
            (self.path / "images" / f"{name}.jpg").write_bytes(buffer.getvalue())
        with (self.path / "questions.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    @property
    def full(self) -> bool:
        """Say whether there are enough questions of every kind that has come up so far."""
        return bool(self.counts) and min(self.counts.values()) >= self.per_kind

    def _wanted(self, asked: Iterator[tuple[Question, list[int]]]) -> list[tuple[Question, list[int]]]:
        here: Counter[tuple[str, str]] = Counter()
        chosen: dict[tuple[str | None, tuple[int, ...]], tuple[Question, list[int]]] = {}
        for one, regions in asked:
            kind, key = (one.attribute, one.form), (one.text, tuple(regions))
            if one.form == "describe" and not one.truth:
                continue  # nothing about the region is clear
            if key not in chosen and self.counts[kind] < self.per_kind and here[kind] < self.per_picture:
                chosen[key] = (one, regions)
                self.counts[kind] += 1
                here[kind] += 1
        return list(chosen.values())

    def _row(self, identity: str, image: str, picture: Picture, one: Question, regions: list[int]) -> dict[str, Any]:
        row = {"id": identity, "split": self.split, "image": image, "question": one.text}
        row |= {"regions": [_rle(picture.masks[i]) for i in regions], "attribute": one.attribute, "form": one.form}
        row |= {"truth": one.truth} if one.form == "describe" else {"answer": one.answer}
        return row | ({"check_names": False} if one.form == "not given" else {})


def main(
    output: Annotated[Path, typer.Option("-o", help="Folder to write; it must not exist, or be empty.")],
    per_kind: Annotated[int, typer.Option(help="Questions of each attribute and form, for each kind of picture.")] = 50,
    masks: Annotated[Path | None, typer.Option(help="Photographs with masks instead of the held-out ones.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another number gives other questions.")] = 0,
) -> None:
    """Write questions about held-out scenes and photographs until there are enough of every kind."""
    if output.exists() and any(output.iterdir()):
        raise SystemExit(f"{output}: expected a new or empty folder")
    (output / "images").mkdir(parents=True)
    if masks is not None:
        folder = Folder(output, "own", 10**9, 10**9, seed)
        try:
            for picture in _own_pictures(masks):
                folder.add(picture)
        except InputError as error:
            raise SystemExit(str(error)) from None
        return
    for split in ("scenes", "photographs"):
        folder = Folder(output, split, per_kind, 2, seed)
        while folder.pictures < 6 * per_kind and not (folder.pictures > per_kind and folder.full):
            rng = np.random.default_rng([_SEEDS[split] + 10 * seed, folder.pictures])
            folder.add(scene(rng) if split == "scenes" else photograph(rng, HELD_OUT_PHOTOS, natural=True))
        typer.echo(f"{split}: {sum(folder.counts.values())} questions about {folder.pictures} pictures")
        for kind, count in folder.counts.items():
            if count < per_kind:
                typer.echo(f"  only {count} of {kind}")


def _all_questions(known: Known, rng: Generator) -> Iterator[tuple[Question, list[int]]]:
    """Questions of every kind with the regions that are given: alone, in pairs, or all together."""
    count = len(known.labels)
    names, everything = [prompt(i) for i in range(count)], list(range(count))
    for region in everything:
        yield describe(known, region, None, rng), [region]
    for _ in range(_ROUNDS):
        region = int(rng.integers(count))
        alone = rng.random() < 0.5
        if one := about_one(known, region, prompt(0) if alone else names[region], rng):
            yield one, [region] if alone else everything
        if count > 1:
            pair = [int(i) for i in rng.permutation(count)[:2]]
            alone = rng.random() < 0.5
            given = dict(zip(pair, (prompt(0), prompt(1)), strict=True)) if alone else dict(enumerate(names))
            if two := about_two(known, *pair, given, rng):
                yield two, pair if alone else everything
        for other in (about_many(known, everything, names, rng), about_none(everything, names, rng)):
            if other and rng.random() < 0.3:
                yield other, everything


def _own_pictures(path: Path) -> Iterator[Picture]:
    """Read photographs with masks; more regions than a request takes become several pictures."""
    for one in photographs(path):
        for start in range(0, len(one.masks), _MOST_REGIONS):
            yield Picture(one.image, one.masks[start : start + _MOST_REGIONS])


def _rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    encoded = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"rle": {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}}


if __name__ == "__main__":
    typer.run(main)
