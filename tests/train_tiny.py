"""The modules of tools/train_tiny, which are scripts beside the package and import each other by plain names."""

import importlib
import sys
from types import ModuleType

from tests.conftest import ROOT


def training_module(name: str) -> ModuleType:
    """Import one of them; sys.path is as before afterwards."""
    folder = str(ROOT / "tools" / "train_tiny")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)
