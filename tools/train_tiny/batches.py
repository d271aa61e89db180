"""Training sequences put together: prefixes side by side, and their branches in rows."""

from dataclasses import dataclass

import torch
from questions import Question
from sequences import UNKNOWN, Example

WIDEST = 400  # tokens of a row of branches, more where one branch is longer


@dataclass
class Batch:
    """Examples put together: L columns are P of the longest prefix, then rows of branches, W columns each.

    A branch lies in one row whole; columns left over are padding. So a row needs to see its prefix and itself only.
    """

    tiles: torch.Tensor
    masks: torch.Tensor
    down: torch.Tensor  # [all regions, n, n]
    across: torch.Tensor
    owner: torch.Tensor  # int64 [all regions]: the example of each region
    prefix: int  # P
    row: int  # W
    ids: torch.Tensor  # [B, L]
    answers: torch.Tensor
    positions: torch.Tensor
    branch: torch.Tensor  # -1 for padding
    named: torch.Tensor
    words: torch.Tensor
    asked: list[list[Question]]
    numbers: torch.Tensor  # [all regions]
    names: torch.Tensor
    labels: torch.Tensor  # [all regions, 3]
    shapes: torch.Tensor


def collate(examples: list[Example]) -> Batch:
    """Put examples together."""
    prefix = max(int((one.branch == 0).sum()) for one in examples)
    row = _row_width(examples)
    columns = [_columns(one, prefix, row) for one in examples]
    length = prefix + -(-(max(int(places[-1]) for places in columns) + 1 - prefix) // row) * row

    def laid_out(name: str, padding: int) -> torch.Tensor:
        rows = torch.full((len(examples), length), padding, dtype=torch.long)
        for number, (one, places) in enumerate(zip(examples, columns, strict=True)):
            rows[number, places] = getattr(one, name).long()
        return rows

    return Batch(
        torch.stack([one.tile for one in examples]),
        torch.stack([one.mask for one in examples]),
        torch.cat([one.down for one in examples]),
        torch.cat([one.across for one in examples]),
        torch.cat([torch.full((len(one.down),), i) for i, one in enumerate(examples)]),
        prefix,
        row,
        laid_out("ids", 0),
        laid_out("answers", 0),
        laid_out("positions", 0),
        laid_out("branch", -1),
        laid_out("named", 0),
        laid_out("words", UNKNOWN),
        [one.asked for one in examples],
        torch.cat([one.numbers for one in examples]),
        torch.cat([one.names for one in examples]),
        torch.cat([one.labels for one in examples]),
        torch.cat([one.shapes for one in examples]),
    )


def _row_width(examples: list[Example]) -> int:
    """Return how wide rows of branches are to be for the longest of these examples to be as short as can be."""
    lengths = [one.branch.bincount().tolist()[1:] for one in examples]
    longest = max(map(max, lengths))
    return min(range(longest, max(longest, WIDEST) + 1, 4), key=lambda row: max(_filled(one, row) for one in lengths))


def _filled(lengths: list[int], row: int) -> int:
    """Return how many columns rows of branches of these lengths have."""
    return -(-_ends(lengths, row)[-1] // row) * row


def _ends(lengths: list[int], row: int) -> list[int]:
    """Return where each branch ends, counted from the first row: one after another, and none in two rows."""
    ends, free = [], 0
    for length in lengths:
        used = free % row
        if used + length > row:
            free += row - used
        free += length
        ends.append(free)
    return ends


def _columns(one: Example, prefix: int, row: int) -> torch.Tensor:
    """Return the column of each token of an example: its prefix first, then branch after branch, row after row."""
    first, *lengths = one.branch.bincount().tolist()
    columns = list(range(first))
    for length, end in zip(lengths, _ends(lengths, row), strict=True):
        columns += range(prefix + end - length, prefix + end)
    return torch.tensor(columns)


def collate_by_length(examples: list[Example], size: int = 2) -> list[Batch]:
    """Put examples of like length together, `size` at a time, the shortest first: there is little padding then."""
    ordered = sorted(examples, key=lambda one: len(one.ids))
    return [collate(ordered[start : start + size]) for start in range(0, len(ordered), size)]
