"""Features of tiles by key: a tile with the same pixels and the same mask is computed once, whoever asks for it.

Tiles go through the tower one by one, and an empty mask adds nothing to it. So the tiles that a region does not touch
are those of every other region of the image, and the features kept for one request are exact for the next.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from garserve.errors import RequestError

DEFAULT_GB = 0.5


@dataclass(frozen=True)
class TileCounts:
    """What became of the tiles asked for since the start.

    A region needs no tiles but its image's, so those count once, with the image; only where they are gone when the
    region comes in a later step, and are computed again for it, they are asked for again.
    """

    asked: int = 0
    computed: int = 0  # once in a step, however many items of it share the tile
    hits: int = 0  # distinct tiles of a step that an earlier one had left
    misses: int = 0
    evicted: int = 0

    @property
    def avoided(self) -> int:
        """Tiles that did not have to be computed."""
        return self.asked - self.computed


@dataclass(frozen=True)
class Placement:
    """Where the distinct tiles of one step lie in `features`, and which of them have to be computed into it."""

    features: torch.Tensor  # [slots, n², C]
    slots: list[int]  # of each key
    missing: list[int]  # positions among the keys


class TileCache:
    """A pool [capacity, n², C] on the device, of which the least recently used tile makes room for a new one.

    The pool is allocated once, by `allocate` or by the first use. Not for several threads at a time. On a device
    with streams, steps follow one another in one stream: a slot is written again only after it was read.
    """

    def __init__(self, gigabytes: float) -> None:
        """Keep as many tiles as `gigabytes` (10⁹ bytes) hold; 0 keeps none."""
        if not 0 <= gigabytes < float("inf"):
            raise RequestError(f"tile_cache_gb: expected 0 or more, got {gigabytes!r:.80}")
        self.gigabytes = gigabytes
        self.capacity = 0
        self.counts = TileCounts()
        self._pool: torch.Tensor | None = None
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._free: list[int] = []

    def allocate(self, like: torch.Tensor, tokens: int, channels: int) -> None:
        """Make the pool on the device and in the dtype of `like` where there is none yet."""
        if self._pool is None or self._pool.device != like.device or self._pool.dtype != like.dtype:
            self.capacity = int(self.gigabytes * 1e9) // (tokens * channels * like.element_size())
            self._pool = torch.empty(self.capacity, tokens, channels, device=like.device, dtype=like.dtype)
            self.clear()

    def clear(self) -> None:
        """Forget all tiles, as after other weights were loaded."""
        self._slots.clear()
        self._free = list(range(self.capacity - 1, -1, -1))

    def place(self, keys: Sequence[bytes], of_images: Sequence[bytes]) -> Placement:
        """Find or make room for the distinct tiles of one step, none of which evicts another; after `allocate`.

        `of_images` are those of each image of the step, a tile of two images twice; they are counted as asked for, as
        are other tiles that are missing. A step of more tiles than the pool holds gets a tensor of its own, into which
        known tiles are copied. Call `forget` where computing what is missing failed.
        """
        pool = self._pool
        if pool is None:
            raise RuntimeError("tile cache: place before allocate")
        known = [key in self._slots for key in keys]
        missing = [position for position, found in enumerate(known) if not found]
        evicted = 0
        if len(keys) > self.capacity:
            placement = Placement(self._apart(keys, known, pool), list(range(len(keys))), missing)
        else:
            for key in (key for key, found in zip(keys, known, strict=True) if found):
                self._slots.move_to_end(key)
            for position in missing:
                if not self._free:
                    self._free.append(self._slots.popitem(last=False)[1])
                    evicted += 1
                self._slots[keys[position]] = self._free.pop()
            placement = Placement(pool, [self._slots[key] for key in keys], missing)
        old, new = self.counts, len(missing)
        images = set(of_images)
        self.counts = replace(
            old,
            asked=old.asked + len(of_images) + sum(keys[position] not in images for position in missing),
            computed=old.computed + new,
            hits=old.hits + len(keys) - new,
            misses=old.misses + new,
            evicted=old.evicted + evicted,
        )
        return placement

    def forget(self, keys: Sequence[bytes]) -> None:
        """Drop tiles, as those that could not be computed."""
        for key in keys:
            if (slot := self._slots.pop(key, None)) is not None:
                self._free.append(slot)

    def _apart(self, keys: Sequence[bytes], known: Sequence[bool], pool: torch.Tensor) -> torch.Tensor:
        features = pool.new_empty(len(keys), *pool.shape[1:])
        held = [position for position, found in enumerate(known) if found]
        if held:
            features[held] = pool[[self._slots[keys[position]] for position in held]]
        return features
