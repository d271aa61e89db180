"""The machine that figures belong to, and where its results go."""

import json
import re
from pathlib import Path
from typing import Any

from garserve.openmp import prefer_intel

prefer_intel()  # before torch comes: for garserve and for its peers

from garserve.bench.machine import machine  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def saved(name: str) -> Any:
    """Return the figures that were saved for this machine, an empty dict where there are none."""
    path = folder() / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.is_file() else {}


def save(name: str, figures: Any, conditions: str) -> Path:
    """Write figures as JSON under results/, in a folder named for the device, and return the file."""
    path = folder() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"conditions": conditions, "machine": machine(), "figures": figures}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def folder() -> Path:
    """Return the folder of this machine's results, which may not be there yet."""
    described = machine()
    device = str(described.get("gpu") or f"{described['cpu']} {described['threads']} threads")
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


if __name__ == "__main__":
    folder().mkdir(parents=True, exist_ok=True)
    print(folder())
