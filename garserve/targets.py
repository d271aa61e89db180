"""Whether a file that is to come can be written, told before anything is computed for it (floor 0)."""

import os
from pathlib import Path


def unwritable(target: Path) -> str | None:
    """Return what is wrong with a file to come; None where it can be written, also over one that is there."""
    if not target.parent.is_dir():
        return f"no such folder: {target.parent}"
    if target.exists():
        return None if not target.is_dir() and os.access(target, os.W_OK) else "expected a file that can be written"
    return None if os.access(target.parent, os.W_OK) else "expected a folder that can be written to"
