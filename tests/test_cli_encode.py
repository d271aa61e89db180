"""`garserve encode`: where tiles are computed is obeyed, or refused before anything is loaded; which tower is noted."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from garserve.export import choice
from typer.testing import CliRunner

from garserve import cli_encode
from garserve.checkpoint import Checkpoint
from garserve.cli import app
from garserve.errors import GarserveError, RequestError
from garserve.inputs.encoded import EncodedImage
from garserve.model import onnx_vision
from garserve.model.device import has_gpu
from tests.conftest import PHOTO, write_lines

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", [{"image": str(PHOTO), "regions": [{"box": [10, 10, 90, 90]}]}])


def encode(source: Path, *options: str) -> BaseException | None:
    arguments = ["encode", "-i", str(source), "-o", str(source.parent / "out"), *options]
    return CliRunner().invoke(app, arguments).exception


@pytest.mark.skipif(has_gpu(), reason="a GPU is here")
@pytest.mark.parametrize("options", [[], ["--vision-backend", "onnx:CPU"], ["--vision-backend", "torch"]])
def test_a_gpu_that_there_is_not(source: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    monkeypatch.setattr(Checkpoint, "open", lambda *_: pytest.fail("a checkpoint is opened"))
    error = encode(source, "--device", "cuda", *options)
    assert isinstance(error, GarserveError), error
    assert "--device cuda: the GPU cannot be used" in str(error)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_the_choice_of_a_tower_is_told_the_device(source: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    told = []

    def choose(*_: object, device: str | None) -> None:
        told.append(device)
        raise RequestError("as far as here")

    monkeypatch.setattr(cli_encode, "_check_gpu", lambda: None)
    monkeypatch.setattr(choice, "choose_vision", choose)
    assert str(encode(source, "--device", device)) == "as far as here"
    assert told == [None if device == "auto" else device]


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "torch bfloat16"), ("float32", "")])
def test_a_gpu_computes_in_the_checkpoint_s_dtype(monkeypatch: pytest.MonkeyPatch, dtype: str, name: str) -> None:
    placed = []
    monkeypatch.setattr("garserve.model.device.has_gpu", lambda: True)
    encoder: Any = SimpleNamespace(place=lambda *where: placed.append(where))
    assert cli_encode._place(encoder, "cpu", dtype) == ""
    assert cli_encode._place(encoder, "auto", dtype) == cli_encode._place(encoder, "cuda", dtype) == name
    assert placed == [("cuda", getattr(torch, dtype))] * 2


def test_files_of_an_exported_tower_name_it(source: Path, monkeypatch: pytest.MonkeyPatch, mini: Path) -> None:
    config = Checkpoint.open(mini).config

    class Exported:
        info = SimpleNamespace(tower="int8 dynamic")

        def __call__(self, tiles: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(tiles), config.tokens_per_tile, config.hidden_size)

    chosen: list[Any] = [(Path("exported"), CPU), None]
    monkeypatch.setattr(choice, "choose_vision", lambda *_, **__: chosen.pop(0))
    monkeypatch.setattr(choice, "open_vision", lambda *_: Exported())
    for towers in (["int8 dynamic"], ["", "int8 dynamic"]):
        encode(source, "-c", str(mini))
        files = [EncodedImage.load(path) for path in (source.parent / "out").glob("*.safetensors")]
        assert sorted(file.tower for file in files) == towers
    assert {bool(file.image.any()) for file in files if file.tower} == {False}
    assert {bool(file.image.any()) for file in files if not file.tower} == {True}


def refuse(*_: object, **__: object) -> Any:
    raise AssertionError("a tower is measured or exported")


def test_on_a_gpu_the_tower_stays_in_torch_unmeasured(mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_fastest", refuse)
    assert choice.choose_vision(Checkpoint.open(mini), device="cuda") is None


@pytest.mark.parametrize(
    ("here", "device", "backend", "provider"),
    [
        ([CPU], "cuda", "onnx", CPU),
        ([CPU], "cuda", "onnx:CPU", CPU),
        ([CUDA, CPU], "cuda", "onnx:CPU", CPU),
        ([CUDA, CPU], "cpu", "onnx:CUDA", CUDA),
        (["TensorrtExecutionProvider", CPU], "cpu", "onnx:tensorrt", "TensorrtExecutionProvider"),
    ],
)
def test_a_provider_of_another_device_is_refused(
    mini: Path, monkeypatch: pytest.MonkeyPatch, here: list[str], device: Any, backend: str, provider: str
) -> None:
    pretend(monkeypatch, here)
    monkeypatch.setattr(choice, "_kept_export", refuse)
    monkeypatch.setattr(choice, "vision_fingerprint", refuse)
    with pytest.raises(RequestError, match=f"expected one that computes on {device}, got {provider}"):
        choice.choose_vision(Checkpoint.open(mini), backend, device=device)


@pytest.mark.parametrize(
    ("device", "backend", "provider"),
    [
        ("cpu", "onnx", CPU),
        ("cpu", "onnx:CPU", CPU),
        ("cuda", "onnx", CUDA),
        ("cuda", "onnx:CUDA", CUDA),
        (None, "onnx", CUDA),
        (None, "onnx:CPU", CPU),
    ],
)
def test_a_provider_fits_the_device(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Any, backend: str, provider: str
) -> None:
    pretend(monkeypatch, [CUDA, CPU])
    (tmp_path / "vision.onnx").touch()
    monkeypatch.setattr(onnx_vision, "check_model", lambda *_: None)
    chosen = choice.choose_vision(Checkpoint.open(mini), backend, tmp_path, device=device)
    assert chosen == (tmp_path / "vision.onnx", provider)


def pretend(monkeypatch: pytest.MonkeyPatch, providers: list[str]) -> None:
    """Have a GPU, and an ONNX Runtime of these providers."""

    class Runtime:
        @staticmethod
        def get_available_providers() -> list[str]:
            return providers

    monkeypatch.setattr(onnx_vision, "require", lambda _: Runtime)
    monkeypatch.setattr(onnx_vision, "has_gpu", lambda: True)
