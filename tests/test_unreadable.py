"""Files that the user may not read, and folders that nothing can be written into: one line that says so."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from garserve.export.choice import choose_vision
from garserve.export.replay import export_replay
from garserve.export.vision import export_vision

from garserve.checkpoint import TINY, Checkpoint, resolve
from garserve.config import weight_files
from garserve.errors import CheckpointError, OnnxError


def deny(monkeypatch: pytest.MonkeyPatch, denied: str) -> None:
    """Have a file of this name refuse to be opened, also where the tests run as root.

    safetensors says of a file that may not be read that there is none.
    """
    opens, safe_open = Path.open, weight_files.safe_open

    def open_file(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == denied:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opens(path, *arguments, **options)

    def open_tensors(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == denied:
            raise FileNotFoundError(f"No such file or directory: {path}")
        return safe_open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_file)
    monkeypatch.setattr(weight_files, "safe_open", open_tensors)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_a_file_that_may_not_be_read(mini_copy: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    deny(monkeypatch, name)
    with pytest.raises(CheckpointError, match=rf"checkpoint file .*/{name} cannot be read \(permission denied\)"):
        Checkpoint.open(mini_copy)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_the_system_does_not_let_be_read(mini_copy: Path) -> None:
    (mini_copy / "model.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read \(permission denied\)"):
        Checkpoint.open(mini_copy)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_folder_in_the_place_of_a_file(mini_copy: Path, name: str) -> None:
    (mini_copy / name).unlink()
    (mini_copy / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"checkpoint file .*/{name} cannot be read \(is a directory\)"):
        Checkpoint.open(mini_copy)


def test_a_folder_that_cannot_be_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="checkpoint '~no-such-user-here/GAR-1B': cannot be looked for"):
        resolve("~no-such-user-here/GAR-1B")
    with pytest.raises(CheckpointError, match="checkpoint '/aaa"):
        resolve("/" + "a" * 300)

    def is_dir(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_dir", is_dir)
    with pytest.raises(CheckpointError, match=r"GAR-1B': cannot be looked for \(permission denied\)"):
        resolve(tmp_path / "GAR-1B")


@pytest.mark.parametrize("kind", ["vision", "replay"])
def test_an_export_into_a_file(mini: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("onnx", reason="ONNX is not installed (pip install garserve[onnx])")
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed (pip install garserve[onnx])")
    (tmp_path / "file").write_text("kept")
    export = export_vision if kind == "vision" else export_replay
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OnnxError, match=rf"{folder}: cannot be written \((file exists|not a directory)\)"):
            export(Checkpoint.open(mini), folder)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_replay_whose_place_is_taken(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="ONNX is not installed (pip install garserve[onnx])")
    (tmp_path / "replay.onnx").mkdir()
    with pytest.raises(OnnxError, match=rf"{tmp_path}: cannot be written \(is a directory\)"):
        export_replay(Checkpoint.open(TINY), tmp_path)


@pytest.mark.parametrize("cache", ["file", "locked", "~no-such-user-here/cache"])
def test_a_cache_that_cannot_be_written(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    """A file in the cache's place; a folder in the lock's, as a read-only cache does to root, too; nobody's home."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed (pip install garserve[onnx])")
    (tmp_path / "file").touch()
    made = Path.mkdir

    def mkdir(folder: Path, *arguments: Any, **options: Any) -> None:
        made(folder, *arguments, **options)
        if folder.is_relative_to(tmp_path / "locked") and folder.parent.name == "vision":
            made(folder / ".lock")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setenv("GARSERVE_CACHE", cache if cache.startswith("~") else str(tmp_path / cache))
    with pytest.raises(OnnxError, match=r"cannot be written .*; set GARSERVE_CACHE, or name --vision-model"):
        choose_vision(Checkpoint.open(mini), "onnx")
