"""What garserve adds to vLLM's workers: answers to calls by name, from whatever process the engine runs in."""

from dataclasses import asdict
from typing import Any


class WorkerExtension:
    """Methods that `collective_rpc` finds on each worker (vLLM's `worker_extension_cls`)."""

    get_model: Any

    def tile_counts(self) -> dict[str, int]:
        """Return the fields of this rank's TileCounts."""
        return asdict(self.get_model().encoder.tile_cache.counts)
