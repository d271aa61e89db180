"""Training sequences: one picture's prompt once, and many questions after it, none of which sees another.

A sequence is a shared prefix (chat header, image, regions) and branches (question, answer). Positions of each branch
go on from the prefix, and a branch attends to the prefix and itself, so each is exactly a request of its own.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from attributes import COLOURS, SHAPES, TEXTURES, RegionLabels
from garserve.kernels.roi_axis import axis_weights
from numpy.random import Generator
from numpy.typing import NDArray
from pictures import Picture, crowded, picture
from questions import HINTED, Known, Question, about_one, describe, prompt, questions

from garserve.config import GARConfig
from garserve.inputs.prompts import DEFAULT_SYSTEM, DESCRIBE, region_preamble
from garserve.inputs.regions import normalised_box
from garserve.inputs.roi import cells_box
from garserve.inputs.tiles import resize_bicubic, resize_nearest
from garserve.inputs.tokenizer import GARTokenizer

QUESTIONS = 10
UNKNOWN = -100
SHOWN = {"colour": COLOURS, "shape": SHAPES, "texture": TEXTURES}  # what hints ask of a region by words


@dataclass
class _Tokens:
    """One branch, as the lists of an Example."""

    ids: list[int]
    answers: list[bool]
    named: list[bool]
    words: list[int]


@dataclass
class Example:
    """One sequence with its tile and regions; L tokens, R listed regions, n tokens along a tile."""

    tile: torch.Tensor  # uint8 [3, S, S]
    mask: torch.Tensor  # bool [S, S]
    down: torch.Tensor  # float [R, n, n]: the replay's weights along y
    across: torch.Tensor  # float [R, n, n]
    ids: torch.Tensor  # int64 [L]
    answers: torch.Tensor  # bool [L]: tokens to be predicted
    positions: torch.Tensor  # int64 [L]
    branch: torch.Tensor  # int64 [L]: 0 for the prefix
    named: torch.Tensor  # bool [L]: tokens of questions that their answers depend on: the word asked, the right option
    words: torch.Tensor  # int64 [L]: where an answer begins, the index in HINTED of what is true, or UNKNOWN
    branches: list[list[Question]]  # the turns of each branch
    numbers: torch.Tensor  # int64 [R]: K of each listed region's <PromptK>
    names: torch.Tensor  # int64 [R]: the token <PromptK>
    labels: torch.Tensor  # int64 [R, 3]: indices of the clear words of SHOWN, or UNKNOWN
    shapes: torch.Tensor  # float [R, 5]: box and the logarithm of the area

    @property
    def asked(self) -> list[Question]:
        """All questions in their order."""
        return [one for turns in self.branches for one in turns]


class ExampleMaker:
    """Makes Examples from seeds for one checkpoint folder's tokenizer and config."""

    def __init__(self, folder: Path, config: GARConfig) -> None:
        self.config = config
        self.tokenizer = GARTokenizer(folder / "tokenizer.json", config)
        self.end = self.tokenizer.special("<|eot_id|>")

    def __call__(self, seed: tuple[int, ...], make: object = picture) -> Example:
        """Make the example of a seed; `make` turns a random generator into a Picture."""
        rng = np.random.default_rng(seed)
        shown: Picture = make(rng)  # type: ignore[operator]
        if rng.random() < 0.25:
            return self.single(Known.of(Picture(shown.image, shown.masks[:1])), rng)
        return self.multi(Known.of(shown), rng)

    def many(self, seed: tuple[int, ...]) -> Example:
        """Make an example of up to five regions, each of which is described, as a group of a batch's requests is."""
        rng = np.random.default_rng(seed)
        known = Known.of(crowded(rng))
        listed = list(range(len(known.labels)))
        names = [prompt(i) for i in listed]
        branches = [[describe(known, i, names[i], rng)] for i in listed]
        branches += [[one] for one in questions(known, listed, names, QUESTIONS - len(branches), rng)]
        return self._example(known, listed, listed, branches, rng, single=False)

    def single(self, known: Known, rng: Generator) -> Example:
        """Return the authors' single-region form: a description, then further turns about the same region."""
        number = 1 if rng.random() < 0.7 else int(rng.integers(5))
        turns = [describe(known, 0, None, rng)]
        for _ in range(4):
            if len(turns) < 4 and (one := about_one(known, 0, prompt(number), rng)) is not None:
                turns.append(one)
        return self._example(known, [0], [number], [turns], rng, single=True)

    def multi(self, known: Known, rng: Generator) -> Example:
        """Return the multi-region form with free questions; now and then only some of the regions are listed."""
        count = len(known.labels)
        listed = list(range(count))
        if count > 1 and rng.random() < 0.25:
            listed = [int(i) for i in rng.permutation(count)[: rng.integers(1, count + 1)]]
        names = [prompt(i) for i in range(count)]
        asked = questions(known, listed, names, QUESTIONS, rng)
        branches = [[one] for one in asked]
        if len(branches) > 3 and rng.random() < 0.3:  # a conversation of three turns
            branches = [[*branches[0], *branches[1], *branches[2]], *branches[3:]]
        return self._example(known, listed, listed, branches, rng, single=False)

    def _example(
        self,
        known: Known,
        listed: list[int],
        numbers: list[int],
        branches: list[list[Question]],
        rng: Generator,
        *,
        single: bool,
    ) -> Example:
        config, special = self.config, self.tokenizer.special
        preamble = region_preamble(numbers, single, self.tokenizer, config)
        system = DEFAULT_SYSTEM if rng.random() < 0.9 else ""
        begin = special("<|begin_of_text|>")
        parts = [begin, begin, *self._header("system"), system, self.end, *self._header("user")]
        prefix: list[int] = []
        for token in self.tokenizer.encode_parts([*parts, config.image_token_id, *preamble]):
            repeats = 2 if token == config.image_token_id else 1
            prefix += [token] * (repeats * config.tokens_per_tile if token in self._repeated else 1)
        ids, answers = list(prefix), [False] * len(prefix)
        named, words = [False] * len(prefix), [UNKNOWN] * len(prefix)
        positions, branch = list(range(len(prefix))), [0] * len(prefix)
        for number, turns in enumerate(branches, start=1):
            tokens = self._branch(turns)
            ids += tokens.ids
            answers += tokens.answers
            named += tokens.named
            words += tokens.words
            positions += range(len(prefix), len(prefix) + len(tokens.ids))
            branch += [number] * len(tokens.ids)
        masks = known.picture.masks
        pictured = self._pictured(known, listed)
        return Example(
            *pictured,
            torch.tensor(ids),
            torch.tensor(answers),
            torch.tensor(positions),
            torch.tensor(branch),
            torch.tensor(named),
            torch.tensor(words),
            branches,
            torch.tensor(numbers),
            torch.tensor([special(prompt(number)) for number in numbers]),
            torch.tensor([_label_indices(known.labels[i]) for i in listed]),
            torch.tensor(
                [[*normalised_box(masks[i]), float(np.log(masks[i].mean()))] for i in listed], dtype=torch.float32
            ),
        )

    def _branch(self, turns: list[Question]) -> "_Tokens":
        tokens = _Tokens([], [], [], [])
        for number, one in enumerate(turns):
            opening = self._header("user") if number else []
            before = self.tokenizer.encode_parts(opening) if opening else []
            asked = self.tokenizer.encode_parts([DESCRIBE if one.text is None else one.text])
            question = [*before, *asked, *self.tokenizer.encode_parts([self.end, *self._header("assistant")])]
            answer = [*self.tokenizer.encode(one.answer), self.end]
            first, last = self._named(one, asked)
            tokens.ids += question + answer
            tokens.answers += [False] * len(question) + [True] * len(answer)
            places = range(-len(before), len(question) + len(answer) - len(before))
            tokens.named += [first <= place < last for place in places]
            truth = UNKNOWN if one.word is None else HINTED.index(one.word)
            tokens.words += [UNKNOWN] * len(question) + [truth] + [UNKNOWN] * (len(answer) - 1)
        return tokens

    def _named(self, one: Question, asked: list[int]) -> tuple[int, int]:
        """Return which tokens of a question its answer depends on; (0, 0) where none, or where words share a token."""
        if one.named is None or one.text is None:
            return 0, 0
        parts = [self.tokenizer.encode_parts([one.text[:end]]) for end in one.named]
        fits = all(asked[: len(part)] == part for part in parts)
        return (len(parts[0]), len(parts[1])) if fits else (0, 0)

    def _header(self, role: str) -> list[str | int]:
        return [
            self.tokenizer.special("<|start_header_id|>"),
            role,
            self.tokenizer.special("<|end_header_id|>"),
            "\n\n",
        ]

    @property
    def _repeated(self) -> set[int]:
        return {self.config.image_token_id, *self.config.crop_token_ids}

    def _pictured(self, known: Known, listed: list[int]) -> tuple[torch.Tensor, ...]:
        size, n = self.config.tile_size, self.config.tokens_per_side
        image = torch.from_numpy(np.ascontiguousarray(known.picture.image)).permute(2, 0, 1)
        union: NDArray[np.bool_] = np.logical_or.reduce(known.picture.masks)
        boxes = [cells_box(normalised_box(known.picture.masks[i]), (1, 1), n) for i in listed]
        down = torch.stack([axis_weights(box[1], box[3], n, n) for box in boxes])
        across = torch.stack([axis_weights(box[0], box[2], n, n) for box in boxes])
        return resize_bicubic(image, size, size), resize_nearest(torch.from_numpy(union), size, size), down, across


def _label_indices(labels: RegionLabels) -> list[int]:
    clear = [(getattr(labels, name), words) for name, words in SHOWN.items()]
    return [UNKNOWN if word is None else words.index(word) for word, words in clear]
