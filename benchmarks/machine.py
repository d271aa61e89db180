"""The machine that figures belong to, and where its results go."""

import json
import re
import shlex
import sys
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from garserve.openmp import prefer_intel

prefer_intel()  # before torch comes: for garserve and for its peers

from garserve.bench.machine import machine, versions  # noqa: E402

RESULTS = Path(__file__).parent / "results"
_DIGITS = 12  # enough to tell weights apart


def save(name: str, figures: Any, conditions: str) -> Path:
    """Write figures as JSON under results/, in a folder named for the device, and return the file."""
    return _write(name, {"conditions": conditions, **origin(), "figures": figures})


def add(name: str, title: str, entry: dict[str, Any], conditions: str) -> Path:
    """Add one entry to the figures of a file, or replace it, and return the file.

    Each entry has its own conditions, machine, versions and command, for others stay from earlier runs. What an older
    file says once for all of its entries is written into each of them first.
    """
    entries = _entries(name)
    entries[title] = {"conditions": conditions, **origin(), **entry}
    return _write(name, {"figures": entries})


def origin() -> dict[str, Any]:
    """Return where figures come from: the machine, the versions, the shipped weights, and the command that this is."""
    return {"machine": machine(), "versions": versions(), "tiny": _tiny(), "command": command()}


def command() -> str:
    """Return the command that this is, without `--save`; of files outside the repository, only the names."""
    script, *told = sys.argv
    shown = [Path(one).name if one.startswith(("/", "..")) else one for one in told if one != "--save"]
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *shown])


def folder() -> Path:
    """Return the folder of this machine's results, which may not be there yet."""
    described = machine()
    device = str(described.get("gpu") or f"{described['cpu']} {described['threads']} threads")
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _tiny() -> str:
    """Return what tells the tiny checkpoint's weights from others: the start of their file's SHA-256."""
    weights = files("garserve") / "data" / "tiny" / "model.safetensors"
    return sha256(weights.read_bytes()).hexdigest()[:_DIGITS]


def _entries(name: str) -> dict[str, Any]:
    path = folder() / f"{name}.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    shared = {key: value for key, value in content.items() if key != "figures"}
    return {title: {**shared, **entry} for title, entry in content["figures"].items()}


def _write(name: str, content: dict[str, Any]) -> Path:
    path = folder() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    folder().mkdir(parents=True, exist_ok=True)
    print(folder())
