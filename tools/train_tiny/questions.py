"""Questions about regions with true answers, in the words that the tiny checkpoint learns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import attributes
import numpy as np
from attributes import COLOURS, POSITIONS, RELATIONS, SHAPES, SIZES, TEXTURES, RegionLabels
from numpy.random import Generator
from numpy.typing import NDArray
from pictures import Picture

from garserve.inputs.prompts import CURIOUS, DEFAULT_SYSTEM, DESCRIBE

Mask = NDArray[np.bool_]
WORDS = {"colour": COLOURS, "size": SIZES, "position": POSITIONS, "shape": SHAPES, "texture": TEXTURES}
DESCRIBE_FORMS = ("Describe {p}.", "Describe {p} in detail.", "What is {p}?", "What can be seen in {p}?")
FREE_FORMS = {
    "colour": ("What colour is {p}?", "What color is {p}?", "What is the colour of {p}?", "What is the color of {p}?"),
    "size": ("How large is {p}?", "What size is {p}?", "How big is {p}?", "What is the size of {p}?"),
    "position": ("Where is {p}?", "Where in the image is {p}?", "In which part of the image is {p}?"),
    "shape": ("What shape is {p}?", "What is the shape of {p}?", "What shape does {p} have?"),
    "texture": ("Is {p} plain or textured?", "What is the texture of {p}?", "What texture does {p} have?"),
}
RELATION_FORMS = (
    "Where is {a} relative to {b}?",
    "What is the relation of {a} to {b}?",
    "How does {a} relate to {b}?",
    "What is the spatial relation of {a} to {b}?",
)
LARGER_FORMS = ("Which is {w}, {a} or {b}?", "Which region is {w}, {a} or {b}?")
WHICH_FORMS = ("Which is {w}, {names}?", "Which region is {w}, {names}?")
SAME_FORMS = (
    "Do {a} and {b} have the same colour?",
    "Do {a} and {b} have the same color?",
    "Are {a} and {b} the same colour?",
)
HINTED = (*(word for words in WORDS.values() for word in words), *RELATIONS, "larger", "smaller")
_TAUGHT = (0.65, 0.27)  # shares of questions about two regions in training: less about their colours
# What is plainly false where a relation is true: never a direction across it, nor "overlapping" of what lies inside.
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_FALSE = {
    **{word: ("inside", "around", "overlapping", other) for word, other in _OPPOSITE.items()},
    "inside": ("around",),
    "around": ("inside",),
    "overlapping": ("inside", "around"),
}


@dataclass(frozen=True)
class Question:
    """A question, its whole answer, and the words that a true answer must contain, by attribute."""

    attribute: str
    form: str  # describe, free, yes/no, choice, which, not given
    text: str | None  # None asks for the description in the single-region form
    answer: str
    truth: dict[str, str]
    word: str | None = None  # of HINTED: what is true, in whatever form it is asked
    named: tuple[int, int] | None = None  # the characters of `text` that the answer depends on: a word or the option


@dataclass(frozen=True)
class Known:
    """A picture with everything that is known of its regions."""

    picture: Picture
    labels: list[RegionLabels]
    fallback: list[str]  # the most frequent colour, even where it is not clear

    @classmethod
    def of(cls, picture: Picture) -> "Known":
        """Compute the labels of all regions."""
        labels = [attributes.labels(picture.image, mask) for mask in picture.masks]
        shares = [
            None if label.colour else attributes.colour_shares(picture.image, mask)
            for label, mask in zip(labels, picture.masks, strict=True)
        ]
        fallback = [label.colour or COLOURS[int(np.argmax(share))] for label, share in zip(labels, shares, strict=True)]
        return cls(picture, labels, fallback)


def prompt(index: int) -> str:
    """Return the name of a region."""
    return f"<Prompt{index}>"


def description(known: Known, region: int) -> tuple[str, dict[str, str]]:
    """Return a sentence about one region, and the clear attributes with their words in it."""
    label, mask = known.labels[region], known.picture.masks[region]
    size = label.size or attributes.nominal_size(mask)
    shape = f", {label.shape}" if label.shape else ""
    surface = f" with a {label.texture} surface" if label.texture else ""
    place = label.position or attributes.nominal_position(mask)
    text = f"A {size}{shape}, {known.fallback[region]} region{surface} at the {place} of the image."
    return text, {name: word for name, word in vars(label).items() if word is not None}


def describe(known: Known, region: int, name: str | None, rng: Generator) -> Question:
    """Ask for a description: of a named region, or in the single-region form."""
    text, truth = description(known, region)
    form = None if name is None else str(rng.choice(DESCRIBE_FORMS)).format(p=name)
    return Question("description", "describe", form, text, truth)


def about_one(known: Known, region: int, name: str, rng: Generator) -> Question | None:
    """Ask for one attribute of one region, or None where the attribute drawn is not clear."""
    attribute = str(rng.choice(list(WORDS), p=[0.34, 0.2, 0.22, 0.14, 0.1]))
    word = getattr(known.labels[region], attribute)
    if word is None:
        return None
    free = str(rng.choice(FREE_FORMS[attribute])).format(p=name)
    answer = f"{name} is at the {word} of the image." if attribute == "position" else f"{name} is {word}."
    form = rng.random()
    if form < 0.55:
        return Question(attribute, "free", free, answer, {attribute: word}, word)
    others = [other for other in WORDS[attribute] if not _includes(other, word)]
    if form < 0.8:
        yes = bool(rng.random() < 0.5)
        asked = word if yes else str(rng.choice(others))
        text = f"Is {name} at the {asked} of the image?" if attribute == "position" else f"Is {name} {asked}?"
        return _yes_no(attribute, text, yes, word, asked)
    return _choice(attribute, free, word, [str(o) for o in rng.permutation(others)[:3]], rng)


def about_two(
    known: Known,
    a: int,
    b: int,
    names: Sequence[str] | Mapping[int, str],
    rng: Generator,
    shares: tuple[float, float] = (0.55, 0.3),
) -> Question | None:
    """Ask how two regions relate, or None where what was drawn is not clear. `names[i]` is the name of region i.

    `shares` of the questions are about how they lie, and about which is larger; the others are about their colours.
    """
    first, second = known.picture.masks[a], known.picture.masks[b]
    kind, form = rng.random(), rng.random()
    forms = {"a": names[a], "b": names[b]}
    if kind < shares[0]:
        word = attributes.relation(first, second)
        if word is None:
            return None
        free = str(rng.choice(RELATION_FORMS)).format(**forms)
        if form < 0.6:
            return Question("relation", "free", free, f"{names[a]} is {word} {names[b]}.", {"relation": word}, word)
        wrong = _OPPOSITE[word] if word in _OPPOSITE and rng.random() < 0.7 else str(rng.choice(_FALSE[word]))
        if form < 0.85:
            yes = bool(rng.random() < 0.5)
            asked = word if yes else wrong
            return _yes_no("relation", f"Is {names[a]} {asked} {names[b]}?", yes, word, asked)
        others = [str(o) for o in rng.permutation(_rivals(word))[:3]]
        return _choice("relation", free, word, others, rng)
    if kind < sum(shares):
        bigger = attributes.larger(first, second)
        if bigger is None:
            return None
        word = "larger" if rng.random() < 0.6 else "smaller"
        first_is = bigger == (word == "larger")
        truth = "larger" if bigger else "smaller"
        if form < 0.6:
            chosen = names[a] if first_is else names[b]
            text = str(rng.choice(LARGER_FORMS)).format(w=word, **forms)
            answer = f"{chosen} is {word}."
            return Question("larger", "free", text, answer, {"larger": chosen}, truth, _place(text, word))
        return _yes_no("larger", f"Is {names[a]} {word} than {names[b]}?", first_is, truth, word)
    colours = known.labels[a].colour, known.labels[b].colour
    if None in colours or (colours[0] != colours[1] and rng.random() < 0.6):
        return None
    return _yes_no("same colour", str(rng.choice(SAME_FORMS)).format(**forms), colours[0] == colours[1])


def about_many(known: Known, listed: Sequence[int], names: Sequence[str], rng: Generator) -> Question | None:
    """Ask which of three or more regions is the largest, the smallest or of a colour; None where it is not clear.

    The question names them all: what a name shows is what the answer is found by.
    """
    if len(listed) < 3:
        return None
    if rng.random() < 0.5:
        areas = sorted((float(known.picture.masks[i].sum()), i) for i in listed)
        word, first, second = "largest", areas[-1], areas[-2]
        if rng.random() < 0.5:
            word, first, second = "smallest", areas[0], areas[1]
        if max(first[0], second[0]) < attributes.LARGER_RATIO * min(first[0], second[0]):
            return None
        return _which("largest", f"the {word}", names[first[1]], [names[i] for i in listed], rng)
    colours = [known.labels[i].colour for i in listed]
    unique = [i for i in listed if colours.count(known.labels[i].colour) == 1]
    if None in colours or not unique:
        return None
    chosen = int(rng.choice(unique))
    return _which("by colour", str(known.labels[chosen].colour), names[chosen], [names[i] for i in listed], rng)


def _which(attribute: str, what: str, chosen: str, names: list[str], rng: Generator) -> Question:
    """Ask which of the names is `what`; the answer depends on the `chosen` one."""
    order = [str(name) for name in rng.permutation(names)]
    text = str(rng.choice(WHICH_FORMS)).format(names=f"{', '.join(order[:-1])} or {order[-1]}", w=what)
    return Question(attribute, "which", text, f"{chosen} is {what}.", {attribute: chosen}, None, _place(text, chosen))


def about_none(listed: Sequence[int], names: Sequence[str], rng: Generator) -> Question | None:
    """Ask about a region that was not given; the honest answer says so."""
    missing = [f"<Prompt{k}>" for k in range(5) if f"<Prompt{k}>" not in [names[i] for i in listed]]
    if not missing:
        return None
    name, given = str(rng.choice(missing)), names[int(rng.choice(list(listed)))]
    kind = rng.random()
    if kind < 0.6:
        text = str(rng.choice(FREE_FORMS[str(rng.choice(list(FREE_FORMS)))])).format(p=name)
    elif kind < 0.8:
        pair = [name, given] if rng.random() < 0.5 else [given, name]
        text = str(rng.choice(RELATION_FORMS)).format(a=pair[0], b=pair[1])
    else:
        text = str(rng.choice(DESCRIBE_FORMS)).format(p=name)
    return Question("not given", "not given", text, f"{name} was not given.", {"not given": f"{name} was not given"})


def questions(known: Known, listed: Sequence[int], names: Sequence[str], count: int, rng: Generator) -> list[Question]:
    """Ask `count` questions or a few less about the listed regions."""
    asked: list[Question] = []
    for _ in range(4 * count):
        if len(asked) == count:
            break
        kind = rng.random()
        one: Question | None
        if kind < 0.1:
            region = int(rng.choice(list(listed)))
            one = describe(known, region, names[region], rng)
        elif kind < 0.15:
            one = about_none(listed, names, rng)
        elif kind < 0.25:
            one = about_many(known, listed, names, rng)
        elif kind < 0.7 and len(listed) > 1:
            a, b = (int(i) for i in rng.permutation(list(listed))[:2])
            one = about_two(known, a, b, names, rng, _TAUGHT)
        else:
            region = int(rng.choice(list(listed)))
            one = about_one(known, region, names[region], rng)
        if one is not None and one.text not in [old.text for old in asked]:
            asked.append(one)
    return asked


def vocabulary() -> str:
    """Return a text with every word that questions and answers use."""
    forms = [
        *DESCRIBE_FORMS,
        *RELATION_FORMS,
        *LARGER_FORMS,
        *SAME_FORMS,
        *(f for fs in FREE_FORMS.values() for f in fs),
    ]
    words = [word for group in (*WORDS.values(), RELATIONS) for word in group]
    sentences = [
        f"A {a}, {b} region with a {b} surface at the {c} of the image." for a in words for b, c in (("red", "top"),)
    ]
    answers = [f"B. {word}\nC. {word}\nD. {word}\n is {word}. Is it {word}? which is {word}," for word in words]
    rest = (
        " is larger. is smaller. Is it larger than that? is smaller than Which is larger, or Which "
        "region is the largest? the smallest? is the largest. was not given. Yes. No. Yes No A B C D E "
        "Question: What?\nOptions:\nA. it\nAnswer with the correct option's letter directly. Is it plain or "
        "textured? Is it at the top left of the image?"
    )
    fixed = [DEFAULT_SYSTEM, CURIOUS, DESCRIBE, "user assistant system"]
    return " ".join([*fixed, *forms, *sentences, *answers, rest])


def _rivals(word: str) -> list[str]:
    """Return the wrong options of a multiple choice: what is false, or what is said only of regions that lie apart."""
    return [*_FALSE[word], *(_OPPOSITE if word in ("inside", "around") else ())]


def _includes(one: str, other: str) -> bool:
    """Say whether one word is the other or a part of it: what is at the top left is at the top, too."""
    return set(one.split()) <= set(other.split()) or set(other.split()) <= set(one.split())


def _place(text: str, words: str) -> tuple[int, int]:
    """Return where words stand in a text for the last time, with the space before them."""
    start = text.rindex(f" {words}")
    return start, start + 1 + len(words)


def _yes_no(attribute: str, text: str, yes: bool, word: str | None = None, asked: str = "") -> Question:
    place = _place(text, asked) if asked else None
    answer = "Yes" if yes else "No"
    return Question(attribute, "yes/no", text, f"{answer}.", {attribute: answer}, word, place)


def _choice(attribute: str, text: str, word: str, others: list[str], rng: Generator) -> Question:
    options = [str(o) for o in rng.permutation([word, *others])]
    letter = "ABCD"[options.index(word)]
    lines = "".join(f"\n{'ABCD'[i]}. {option}" for i, option in enumerate(options))
    asked = f"Question: {text}\nOptions:{lines}\nAnswer with the correct option's letter directly."
    start = asked.index(f"\n{letter}. ") + 3
    return Question(attribute, "choice", asked, letter, {attribute: letter}, word, (start, start + 1 + len(word)))
