"""What a careful user writes with transformers alone: the authors' model, over batches of regions.

Each photograph is resized once for a batch, all tiles share passes through the tower, and the prompts share one
`generate` with fused attention. Requests of a batch with the same photograph and the same masks share their tiles'
features, too. No tile is computed for one mask and used under another.
"""

from collections.abc import Sequence

import torch

from peers.upstream import UpstreamGAR
from peers.upstream_inputs import Inputs, Question


class BatchedGAR(UpstreamGAR):
    """One checkpoint, answering questions in batches of neighbours."""

    tiles_at_once = 32  # in a pass through the tower

    @classmethod
    def sharing(cls, other: UpstreamGAR) -> "BatchedGAR":
        """The same checkpoint with the weights of another peer."""
        made = cls.__new__(cls)
        made.__dict__.update(vars(other))
        return made

    def answers(self, questions: Sequence[Question], max_tokens: int, batch_size: int) -> list[list[int]]:
        """Return the greedy tokens of each answer, in order."""
        found: list[list[int]] = []
        for start in range(0, len(questions), batch_size):
            found += self.generate(self.embed_all(questions[start : start + batch_size]), max_tokens)
        return found

    def embed_all(self, questions: Sequence[Question]) -> list[torch.Tensor]:
        """Embed the prompts of one batch."""
        prepared: list[Inputs] = []
        resized: dict[int, torch.Tensor] = {}  # by image
        for question in questions:
            prepared.append(self.inputs(question, pixels=resized.get(id(question.image))))
            resized[id(question.image)] = prepared[-1].pixels
        alike = [next(i for i, other in enumerate(prepared) if _same_tiles(one, other)) for one in prepared]
        distinct = sorted(set(alike))
        pixels = torch.cat([prepared[i].pixels for i in distinct])
        numbers = torch.cat([prepared[i].numbers for i in distinct])
        parts = zip(pixels.split(self.tiles_at_once), numbers.split(self.tiles_at_once), strict=True)
        features = torch.cat([self.features(*part) for part in parts])
        by_request = dict(zip(distinct, features.split([len(prepared[i].pixels) for i in distinct]), strict=True))
        return [self.fill(one, by_request[i]) for one, i in zip(prepared, alike, strict=True)]


def _same_tiles(one: Inputs, other: Inputs) -> bool:
    return one.pixels is other.pixels and torch.equal(one.numbers, other.numbers)
