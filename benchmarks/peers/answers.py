"""The peers' answers to garserve's requests: computed here, or in a process of their own.

A process of its own has torch's own OpenMP, as the authors' code has it where nobody looks for a better one.
"""

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from garserve.checkpoint import Checkpoint
from garserve.inputs.processor import draw_masks
from garserve.inputs.request import RegionRequest
from garserve.openmp import OFF, prefer_intel
from peers.batched import BatchedGAR
from peers.upstream import UpstreamGAR
from peers.upstream_inputs import Question

_SINGLE = 1  # number of the region in the single-region form


class Peers:
    """Both peers on one checkpoint, which they share."""

    def __init__(self, folder: Path) -> None:
        self._upstream = UpstreamGAR(Checkpoint.open(folder))
        self._careful = BatchedGAR.sharing(self._upstream)

    def upstream(self, requests: Sequence[RegionRequest]) -> list[list[int]]:
        """Answer one request after the other, as published; tokens without the stop token."""
        peer = self._upstream
        return [peer.without_stop(peer.answer(_question(one), one.max_tokens)) for one in requests]

    def batched(self, requests: Sequence[RegionRequest], size: int) -> list[list[int]]:
        """Answer requests in batches of `size` neighbours; tokens without the stop token."""
        found = self._careful.answers([_question(one) for one in requests], requests[0].max_tokens, size)
        return [self._careful.without_stop(tokens) for tokens in found]


class PeersApart:
    """The same in a process of its own, which ends with this one."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        before = {name: os.environ.get(name) for name in (OFF, "LD_PRELOAD")}
        os.environ[OFF] = "torch"
        os.environ.pop("LD_PRELOAD", None)
        try:
            context.Process(target=_serve, args=(theirs, folder), daemon=True).start()
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            theirs.close()  # only their process has it now: where that ends, `recv` says so instead of waiting
        self._pipe.recv()

    def upstream(self, requests: Sequence[RegionRequest]) -> list[list[int]]:
        """As `Peers.upstream`."""
        return self._ask("upstream", requests)

    def batched(self, requests: Sequence[RegionRequest], size: int) -> list[list[int]]:
        """As `Peers.batched`."""
        return self._ask("batched", requests, size)

    def _ask(self, name: str, *given: object) -> list[list[int]]:
        self._pipe.send((name, given))
        tokens: list[list[int]] = self._pipe.recv()
        return tokens


def _serve(pipe: Connection, folder: Path) -> None:
    if prefer_intel():
        raise SystemExit("the peers' process has Intel's OpenMP: expected torch's own")
    peers = Peers(folder)
    pipe.send("ready")
    while True:
        name, given = pipe.recv()
        pipe.send(getattr(peers, name)(*given))


def _question(request: RegionRequest) -> Question:
    """The same request for a peer: with `focus`, one region is listed and all are marked."""
    image = request.image
    masks = draw_masks(request.parsed_regions(), *image.shape[:2])
    if request.question is None:
        return Question(image, masks, [_SINGLE])
    return Question(image, masks, list(range(len(masks))), request.question, request.listed())
