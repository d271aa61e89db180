"""The files that `garserve batch` writes beside its output (floor 7)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from garserve.errors import GarserveError, RequestError

if TYPE_CHECKING:
    from garserve.batch.run import Plan


@dataclass(frozen=True)
class Targets:
    """COCO's JSON and Parquet, written when all is answered, and the numbers of the run; None is not wanted."""

    coco: Path | None
    parquet: Path | None
    metrics: Path | None

    def check(self, plan: "Plan", ids: Path | None) -> None:
        """Check before anything begins that they can be written at the end; RequestError names the option if not."""
        from garserve.batch.outputs import check_apart, check_coco, check_parquet

        coco, parquet, metrics = self.coco, self.parquet, self.metrics
        if metrics is not None and not metrics.parent.is_dir():
            raise RequestError(f"--metrics-file {metrics}: no such folder: {metrics.parent}")
        if coco is not None:
            check_coco(plan.input, plan.format, coco, each_region=plan.reading.each_region)
        if parquet is not None:
            check_parquet(plan.input, parquet)
        check_apart(input=plan.input, output=plan.output, coco=coco, parquet=parquet, metrics_file=metrics, ids=ids)

    def write(self, plan: "Plan") -> None:
        """Write a whole output in its other forms; GarserveError where one cannot be."""
        from garserve.batch.outputs import write_coco, write_parquet

        if self.coco is not None:
            write_coco(plan.input, plan.output, self.coco)
        if self.parquet is not None:
            write_parquet(plan.output, self.parquet)

    def write_metrics(self, numbers: Mapping[str, object]) -> None:
        """Write the numbers of a run as JSON; GarserveError where they cannot be."""
        if self.metrics is None:
            return
        try:
            self.metrics.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise GarserveError(f"--metrics-file {self.metrics}: cannot be written ({error.strerror})") from None
