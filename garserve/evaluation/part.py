"""The parts of a model whose worth an ablation shows."""

from enum import StrEnum


class Part(StrEnum):
    """What is taken out."""

    replay = "replay"
    mask = "mask"
