"""Which records of an image are asked together, in the model's form for several regions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from garserve.batch.record import Id
from garserve.inputs.request import RegionRequest
from garserve.inputs.shapes import Mask
from garserve.inputs.tokenizer import PROMPT_NAME

LARGEST_GROUP = 5
GAP = 0.1  # share of the image; nearer regions blur what tiny says of their sizes (benchmarks/batch.py)
_ALONE = re.compile(re.escape("<Prompt0>"))

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Drawn:
    """A record that can be asked: its request, its masks, and their boxes, normalised."""

    position: int
    id: Id
    request: RegionRequest
    masks: list[Mask]
    boxes: list[Box]


def group_records(drawn: Sequence[Drawn], size: int, gap: float) -> list[list[Drawn]]:
    """Put records that may share a prompt together, the largest region first, each into the first group that takes it.

    A group has one system prompt, since that comes before the image, and regions that do not overlap and whose boxes
    lie at least `gap` of the image's width or height apart, since one mask marks them all.
    """
    if size > 1:
        drawn = sorted(drawn, key=lambda one: -int(one.masks[0].sum()))
    groups: list[list[Drawn]] = []
    open_groups: list[list[Drawn]] = []
    for one in drawn:
        fitting = size > 1 and is_groupable(one.request)
        group = next((group for group in open_groups if _fits(one, group, gap)), None) if fitting else None
        if group is None:
            group = []
            groups.append(group)
            open_groups += [group] if fitting else []
        group.append(one)
        open_groups = [group for group in open_groups if len(group) < size]
    return groups


def is_groupable(request: RegionRequest) -> bool:
    """Say whether a request asks about one region in a way that another name for it does not change."""
    one = len(request.regions) == 1 and request.focus is None and request.prompt_index is None and not request.turns
    return one and request.check_names


def renamed(question: str | None, number: int) -> str:
    """Return a question about the one region, which is called `<PromptN>` now; without a question, the description."""
    name = f"<Prompt{number}>"
    return f"Describe {name} in detail." if question is None else _ALONE.sub(name, question)


def own_first(text: str, number: int) -> str:
    """Return an answer about `<PromptN>` in which that is `<Prompt0>`, as the question calls it, and the other way."""
    names = {"<Prompt0>": f"<Prompt{number}>", f"<Prompt{number}>": "<Prompt0>"}
    return PROMPT_NAME.sub(lambda named: names.get(named[0], named[0]), text)


def _fits(one: Drawn, group: list[Drawn], gap: float) -> bool:
    if one.request.system != group[0].request.system:
        return False
    if gap and any(_distance(one.boxes[0], other.boxes[0]) < gap for other in group):
        return False
    return not any((one.masks[0] & other.masks[0]).any() for other in group)


def _distance(one: Box, other: Box) -> float:
    """Return how far two boxes lie apart, along the axis along which that is further; 0 where they meet."""
    return max(one[0] - other[2], other[0] - one[2], one[1] - other[3], other[1] - one[3], 0.0)
