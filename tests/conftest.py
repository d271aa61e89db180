"""Shared fixtures: a small random checkpoint, engines started once, and the folders that only some checkouts have."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from garserve.openmp import prefer_intel

prefer_intel()  # before a test imports torch, as `garserve` does for whoever begins with it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ.get("GARSERVE_TEST_DEVICE", "cpu") == "cpu":  # before any import of triton: kernels run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run, however slow the machine is.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
PHOTO = ROOT / "garserve" / "data" / "coffee.jpg"


@pytest.fixture(scope="session")
def golden() -> Path:
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("golden vectors are not part of this checkout")
    return folder


@pytest.fixture(scope="session")
def photos() -> Path:
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the photographs with masks are not part of this checkout")
    return folder


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with every part of GAR-1B at a tiny size, float32, random weights."""
    from garserve.model.random_checkpoint import write_random_checkpoint

    return write_random_checkpoint(tmp_path_factory.mktemp("mini"))


@pytest.fixture
def mini_copy(mini: Path, tmp_path: Path) -> Path:
    """A copy of the mini checkpoint that a test may damage."""
    import shutil

    return Path(shutil.copytree(mini, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def reference(mini: Path) -> Iterator[object]:
    import garserve

    with garserve.load(mini, "reference") as engine:
        yield engine


@pytest.fixture(scope="session")
def tiny_reference() -> Iterator[object]:
    import garserve

    with garserve.load("tiny", "reference") as engine:
        yield engine


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """One garserve server on the tiny checkpoint for all tests over HTTP; file:// images come from `server.folder`."""
    pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
    from tests.served import served

    folder = tmp_path_factory.mktemp("server")
    images = folder / "images"
    images.mkdir()
    (images / "photo.jpg").write_bytes(PHOTO.read_bytes())
    options = ["--image-folder", str(images), "--image-host", "localhost", "--image-host", "metadata.invalid"]
    options += ["--body-seconds", "3", "--max-body-mb", "8", "--max-image-mb", "5"]
    with served(folder, *options) as running:
        running.folder = images
        yield running
    assert "nanobind: leaked" not in running.log.read_text()  # what Triton tells of an interpreter that is taken apart


@pytest.fixture(scope="module")
def vllm_engine(mini: Path) -> Iterator[object]:
    """One vLLM engine on the mini checkpoint for all tests of a file; vLLM runs one in a process at a time."""
    pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
    import garserve

    with garserve.load(mini, "vllm") as engine:
        yield engine


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    """A small picture with structure everywhere: uint8 [90, 140, 3]."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0:90, 0:140]
    base = np.stack([x * 255 // 140, y * 255 // 90, (x + y) * 255 // 230], axis=-1)
    return np.clip(base + rng.integers(-40, 40, base.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def photo() -> Image.Image:
    return Image.open(PHOTO)


def write_lines(path: Path, lines: list[object]) -> Path:
    """Write JSON lines; a str is written as it is."""
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path
