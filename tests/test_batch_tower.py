"""Which tower a job was begun with: told by what an export is, not by where it lies."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from garserve import cli_batch
from garserve.batch.identity import vision_identity
from garserve.cli import app
from garserve.errors import OnnxError, RequestError
from garserve.model.onnx_file import ModelInfo
from tests.batch_data import run_echo, write_requests

onnx = pytest.importorskip("onnx", reason="ONNX is not installed (pip install garserve[onnx])")
STATIC = {"activations": "static", "calibration_errors": {"static": 0.02}}


def exported(folder: Path, dtype: str, **config: Any) -> Path:
    """A folder with a model that says what it is, and computes nothing."""
    info = ModelInfo("vision", "0", "f", dtype, 23, 1e-4, config)
    model = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    onnx.helper.set_model_props(model, info.as_properties())
    folder.mkdir(exist_ok=True)
    onnx.save_model(model, str(folder / "vision.onnx"))
    return folder


def test_a_tower_is_told_by_what_it_is(tmp_path: Path) -> None:
    int8 = exported(tmp_path / "int8", "int8", activations="dynamic")
    assert vision_identity(None, int8) == vision_identity("onnx", int8 / "vision.onnx") == "onnx int8 dynamic"
    assert vision_identity("onnx:CPU", exported(tmp_path / "static", "int8", **STATIC)) == "onnx:CPU int8 static 0.02"
    assert vision_identity(None, exported(tmp_path / "fp32", "fp32")) == vision_identity("onnx", None) == "onnx"
    assert (vision_identity(None, None), vision_identity("torch", None)) == (None, "torch")
    with pytest.raises(OnnxError, match=r"vision\.onnx: no such file"):
        vision_identity(None, tmp_path)


def test_a_job_goes_on_with_the_same_model_elsewhere_and_not_with_another_in_its_place(
    mini: Path, tmp_path: Path
) -> None:
    source, out = write_requests(tmp_path, 4), tmp_path / "out.jsonl"
    here = exported(tmp_path / "here", "int8", activations="dynamic")
    run_echo(source, out, mini, vision=vision_identity(None, here))
    there = Path(shutil.copytree(here, tmp_path / "there"))
    assert run_echo(source, out, mini, vision=vision_identity("onnx", there)).rows == 0
    exported(here, "fp16")
    with pytest.raises(RequestError, match='begun with vision "onnx int8 dynamic", now it is "onnx fp16"; choose'):
        run_echo(source, out, mini, vision=vision_identity(None, here))
    with pytest.raises(RequestError, match='begun with vision "onnx int8 dynamic", now it is null; choose'):
        run_echo(source, out, mini, vision=vision_identity(None, None))


def test_the_command_notes_its_model(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = []

    def run(plan: Any, *_: object) -> None:
        noted.append(plan.vision)
        raise RequestError("as far as here")

    monkeypatch.setattr(cli_batch, "_run", run)
    source = write_requests(tmp_path, 1)
    arguments = ["batch", "-i", str(source), "-o", str(tmp_path / "out.jsonl"), "-c", str(mini)]
    model = exported(tmp_path / "model", "fp16")
    for options in (["--vision-model", str(model)], ["--vision-backend", "onnx"], []):
        assert str(CliRunner().invoke(app, [*arguments, *options]).exception) == "as far as here"
    assert noted == ["onnx fp16", "onnx", None]
