"""What is asked inside the decoder while it learns: where names lie, what they should attend to, what they show."""

import torch
from attention import attention_scores
from batches import Batch
from sequences import SHOWN, UNKNOWN
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaModel


def name_places(batch: Batch, owner: torch.Tensor) -> torch.Tensor:
    """Return the column of the name before each region's crop tokens, [all regions]."""
    places = []
    for region, (row, name) in enumerate(zip(batch.owner.tolist(), batch.names.tolist(), strict=True)):
        first = int((owner[row] == region).nonzero()[0, 0])
        places.append(int((batch.ids[row, :first] == name).nonzero()[-1, 0]))
    return torch.tensor(places)


WORDS = tuple(len(words) for words in SHOWN.values())
GUESSES = sum(WORDS) + 5  # of a region: its words, its box, the logarithm of its area


def shown_loss(guessed: torch.Tensor, batch: Batch, region: torch.Tensor) -> torch.Tensor:
    """Loss of guesses [N, GUESSES] about the regions [N]: words where they are clear, box, logarithm of the area."""
    labels, shapes = batch.labels[region], batch.shapes[region]
    *words, box, area = guessed.split([*WORDS, 4, 1], dim=1)
    loss = 4 * functional.smooth_l1_loss(box, shapes[:, :4], beta=0.1)
    loss = loss + 0.5 * functional.smooth_l1_loss(area[:, 0], shapes[:, 4] + 3.5)
    for guess, truth, weight in zip(words, labels.unbind(1), (1.0, 0.3, 0.3), strict=True):
        if bool((truth != UNKNOWN).any()):
            loss = loss + weight * functional.cross_entropy(guess, truth, ignore_index=UNKNOWN)
    return loss


def mentions(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find names of listed regions in the branches: row and column of each, and which of all regions it names."""
    rows, columns, regions = [], [], []
    for region, (owner, name) in enumerate(zip(batch.owner.tolist(), batch.names.tolist(), strict=True)):
        places = ((batch.ids[owner] == name) & (batch.branch[owner] > 0)).nonzero()[:, 0]
        rows.append(torch.full_like(places, owner))
        columns.append(places)
        regions.append(torch.full_like(places, region))
    return torch.cat(rows), torch.cat(columns), torch.cat(regions)


def compared(batch: Batch) -> torch.Tensor:
    """Find where answers are written, and the first and the last listed region that their questions name.

    Returns int64 [M, 6]: row, column of the token before an answer's token, columns of the two names in the question,
    and which of all regions they name. A question that names no listed region is left out.
    """
    regions: list[dict[int, int]] = [{} for _ in batch.asked]
    for region, (owner, name) in enumerate(zip(batch.owner.tolist(), batch.names.tolist(), strict=True)):
        regions[owner][name] = region
    found = []
    for row, (ids, branches, learnt) in enumerate(
        zip(batch.ids.tolist(), batch.branch.tolist(), batch.answers.tolist(), strict=True)
    ):
        named: list[int] = []
        for column in range(batch.prefix, len(ids)):
            fresh = branches[column] != branches[column - 1] or (learnt[column - 1] and not learnt[column])
            named = [] if fresh else named
            if not learnt[column] and ids[column] in regions[row]:
                named = [*named, column]
            if named and column + 1 < len(ids) and learnt[column + 1]:
                first, last = named[0], named[-1]
                found.append([row, column, first, last, regions[row][ids[first]], regions[row][ids[last]]])
    return torch.tensor(found, dtype=torch.long).reshape(-1, 6)


def matched(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find where answers begin that depend on words in their question: row, column of the token before, words [M, L].

    The words are those of the same turn: they stand between the answer before, or the branch's start, and this one.
    """
    learnt, named = batch.answers.bool(), batch.named.bool()
    begins = learnt & ~learnt.roll(1, dims=1)
    rows, columns = begins.nonzero(as_tuple=True)
    turn = begins.cumsum(1)  # at an answer's first token, its number in the row; one less in its question
    wanted = named[rows] & (turn[rows] == turn[rows, columns][:, None] - 1)
    wanted &= batch.branch[rows] == batch.branch[rows, columns][:, None]
    some = wanted.any(dim=1)
    return rows[some], columns[some] - 1, wanted[some]


def options(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the right options of multiple choices: row and column of each of their tokens, and the letter, 0 for A."""
    learnt = batch.answers.bool()
    begins = learnt & ~learnt.roll(1, dims=1)
    turn, found = begins.cumsum(1), []
    for row, asked in enumerate(batch.asked):
        for number, one in enumerate(asked):
            if one.form == "choice":
                columns = (batch.named[row].bool() & (turn[row] == number)).nonzero()[:, 0].tolist()
                found += [[row, column, "ABCD".index(one.answer)] for column in columns]
    return torch.tensor(found, dtype=torch.long).reshape(-1, 3).unbind(1)  # type: ignore[return-value]


def attention_loss(
    decoder: LlamaModel,
    number: int,
    batch: Batch,
    hidden: list[torch.Tensor],
    queries: tuple[torch.Tensor, torch.Tensor],
    wanted: torch.Tensor,
) -> torch.Tensor:
    """Loss of the attention that tokens (rows and columns [M]) pay to the `wanted` ones of their sequences, evenly.

    Of layer `number`, counted from 0, the first head of each group is taught: all of them the same where `wanted`
    is [M, L], each its own where it is [M, groups, L].
    """
    logs = attention_scores(decoder, number, batch, hidden, queries, heads=1)[:, :, 0].log_softmax(-1)
    each = wanted if wanted.ndim == 3 else wanted[:, None]
    counts = each.sum(-1)
    return -(logs.masked_fill(~each, 0).sum(-1) / counts + counts.log()).mean()
