"""What a careful user writes with transformers alone: the authors' model, over batches of regions.

The photograph is resized once for the regions of a batch, their tiles share passes through the tower, and their
prompts one `generate` with fused attention. No tile is computed for one region and used for another.
"""

from collections.abc import Sequence

import torch

from peers.upstream import UpstreamGAR
from peers.upstream_inputs import Question


class BatchedGAR(UpstreamGAR):
    """One checkpoint, answering questions about one image in batches."""

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
        prepared = [self.inputs(questions[0])]
        for question in questions[1:]:
            shared = prepared[0].pixels if question.image is questions[0].image else None
            prepared.append(self.inputs(question, pixels=shared))
        pixels = torch.cat([one.pixels for one in prepared])
        numbers = torch.cat([one.numbers for one in prepared])
        parts = zip(pixels.split(self.tiles_at_once), numbers.split(self.tiles_at_once), strict=True)
        features = torch.cat([self.features(*part) for part in parts])
        counts = [len(one.pixels) for one in prepared]
        return [self.fill(one, own) for one, own in zip(prepared, features.split(counts), strict=True)]
