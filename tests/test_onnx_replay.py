"""The exported replay and `garserve export verify`: equal to the reference, and failing where they are not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from garserve.export.replay import export_replay
from garserve.export.samples import relative_error
from garserve.export.verify import Check, verify
from typer.testing import CliRunner

from garserve.checkpoint import TINY, Checkpoint
from garserve.cli import app
from garserve.config import BoxScale
from garserve.errors import GarserveError, OnnxError, RequestError
from garserve.inputs.roi import replay_roi
from garserve.model.onnx_file import read_info
from garserve.model.replay import replay
from tests.onnx_models import tiny_models

onnx = pytest.importorskip("onnx", reason="ONNX is not installed (pip install garserve[onnx])")
ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed (pip install garserve[onnx])")


@pytest.mark.parametrize("scale", ["released", "geometric"])
def test_replay_of_any_grid_and_any_number_of_regions(tmp_path: Path, scale: BoxScale) -> None:
    checkpoint = Checkpoint.open(TINY)
    info = export_replay(checkpoint, tmp_path, box_scale=scale)
    assert info == read_info(tmp_path, "replay")
    assert info.config["box_scale"] == scale
    assert info.opset <= 21
    session = ort.InferenceSession(str(tmp_path / "replay.onnx"), providers=["CPUExecutionProvider"])
    config, generator = checkpoint.config.with_box_scale(scale), torch.Generator().manual_seed(3)
    side = config.tokens_per_side
    for grid, count in (((1, 1), 1), ((3, 2), 7), ((1, 4), 2), ((6, 6), 33), ((2, 1), 0)):
        features = torch.randn(grid[0] * grid[1], side**2, config.hidden_size, generator=generator)
        boxes = torch.rand(count, 2, 2, generator=generator).sort(1).values.flatten(1)
        if count > 1:
            boxes[0], boxes[1] = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.5, 0.5, 0.5, 0.5])
        feeds = {"features": features.numpy(), "boxes": boxes.numpy(), "grid": np.array(grid)}
        ours = torch.from_numpy(session.run(None, feeds)[0])
        assert ours.shape == (count, side**2, config.hidden_size)
        for row, box in zip(ours, boxes.double().tolist(), strict=True):
            roi = replay_roi(tuple(box), grid, config)
            read = features[[place - 1 for place in roi.window.tile_indices(grid)]]
            assert relative_error(row, replay(read, roi, side)) <= 1e-5, (grid, box)


def test_no_such_scale(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="box_scale: expected released or geometric, got 'wide'"):
        export_replay(Checkpoint.open(TINY), tmp_path, box_scale="wide")  # type: ignore[arg-type]


def test_verify_passes_what_was_exported() -> None:
    result = CliRunner().invoke(app, ["export", "verify", str(tiny_models()), "--json"], catch_exceptions=False)
    checks = json.loads(result.stdout)
    assert result.exit_code == 0
    assert all(check["passed"] for check in checks)
    structure = ["names", "dynamic axes", "dtypes and shapes", "checker and shape inference"]
    for model in ("vision", "replay"):
        own = [check for check in checks if check["model"] == model]
        assert [check["check"] for check in own[:4]] == structure
        measured = [check for check in own if check["limit"] is not None]
        assert len(measured) >= 3
        assert all(0 < check["relative"] <= check["limit"] == 1e-4 for check in measured)
    assert any("photograph" in check["check"] for check in checks)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The float32 models in a folder that a test may damage."""
    return Path(shutil.copytree(tiny_models(), tmp_path / "models"))


def failed(folder: Path) -> list[Check]:
    return [
        check for check in verify(folder, Checkpoint.open(TINY), providers=["CPUExecutionProvider"]) if not check.passed
    ]


def test_verify_sees_a_falsified_weight(copy: Path) -> None:
    data = np.fromfile(copy / "vision.onnx.data", dtype=np.float32)
    data[len(data) // 2 :] *= 1.01
    data.tofile(copy / "vision.onnx.data")
    found = failed(copy)
    assert [(check.model, check.provider) for check in found] == [("vision", "CPUExecutionProvider")]
    assert "values" in found[0].check
    assert found[0].relative is not None
    assert found[0].relative > 1e-4
    result = CliRunner().invoke(app, ["export", "verify", str(copy)], catch_exceptions=False)
    assert result.exit_code == 1
    assert "✗" in result.stdout


@pytest.mark.parametrize(
    ("kind", "check"), [("rename", "names"), ("fix", "dynamic axes"), ("shape", "dtypes and shapes")]
)
def test_verify_stops_at_the_first_structure_that_is_not_as_promised(copy: Path, kind: str, check: str) -> None:
    path = copy / "vision.onnx"
    model = onnx.load(str(path), load_external_data=False)
    value = model.graph.output[0] if kind == "shape" else model.graph.input[0]
    if kind == "rename":
        value.name = "pictures"
    axis = value.type.tensor_type.shape.dim[0 if kind == "fix" else 2]
    if kind != "rename":
        axis.Clear()
        axis.dim_value = 5
    path.write_bytes(model.SerializeToString())
    found = [one for one in verify(copy, Checkpoint.open(TINY)) if one.model == "vision"]
    assert [one.check for one in found if not one.passed] == [check]
    assert found[-1].check == check


def test_verify_of_nothing_and_of_another_checkpoint(tmp_path: Path, mini: Path) -> None:
    with pytest.raises(OnnxError, match=r"expected vision.onnx or replay.onnx, got neither"):
        list(verify(tmp_path, Checkpoint.open(TINY)))
    with pytest.raises(OnnxError, match=r"vision.onnx: exported from another checkpoint"):
        list(verify(tiny_models(), Checkpoint.open(mini)))


def test_a_provider_that_the_replay_does_not_start_on_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_replay(Checkpoint.open(TINY), tmp_path)

    class Fallen:
        def __init__(self, *_: object, providers: list[str]) -> None:
            if providers == ["TensorrtExecutionProvider"]:
                raise RuntimeError("no engine\nfor this graph")

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "InferenceSession", Fallen)
    names = ["CUDAExecutionProvider", "TensorrtExecutionProvider"]
    found = [one for one in verify(tmp_path, Checkpoint.open(TINY), providers=names) if one.provider]
    assert [(one.provider, one.check, one.passed) for one in found] == [(name, "session", False) for name in names]
    assert [one.note for one in found] == [
        "CUDAExecutionProvider is installed but does not start here: CPUExecutionProvider",
        "no engine",
    ]


def test_export_commands(mini: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    out = run(app, ["export", "replay", str(mini), "-o", str(tmp_path), "--json"], catch_exceptions=False)
    assert json.loads(out.stdout)["config"]["box_scale"] == "geometric"
    out = run(app, ["export", "vision", str(mini), "-o", str(tmp_path), "--fuse"], catch_exceptions=False)
    assert out.exit_code == 0
    assert "fp32, opset 23, 3 BiasGelu; relative error" in out.stdout.replace("\n", " ")
    with pytest.raises(GarserveError, match="calibration: only int8"):
        run(app, ["export", "vision", "tiny", "-o", str(tmp_path), "--calibrate", str(PHOTOS)], catch_exceptions=False)
    with pytest.raises(GarserveError, match="expected a folder with images"):
        run(app, ["export", "vision", "tiny", "-o", "x", "--calibrate", str(tmp_path)], catch_exceptions=False)
    assert run(app, ["export", "verify", str(tmp_path), "-c", str(mini)]).exit_code == 0


PHOTOS = Path(__file__).resolve().parent.parent / "garserve" / "data" / "coffee.jpg"
