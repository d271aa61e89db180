"""What the command line refuses in one line before anything is loaded."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from garserve.kernels import compile_check
from typer.testing import CliRunner

import garserve
from garserve.cli import app
from garserve.cli_options import OWN_OPTIONS, parse_engine_options
from garserve.cli_shared import engine_options
from garserve.errors import GarserveError, RegionError, RequestError
from garserve.serving import launch
from tests.conftest import PHOTO

runner = CliRunner()
BOX = ["--box", "10,10,90,90"]


def run(*arguments: object) -> None:
    runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_an_rle_of_pixels(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(RegionError, match=r"--rle .*coffee.jpg: not text; expected JSON or a file that holds it"):
        run("describe", PHOTO, "--rle", PHOTO)
    with pytest.raises(RegionError, match="--rle: not JSON"):
        run("describe", PHOTO, "--rle", tmp_path / "deep.json")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("checkpoint=other", "--engine-option checkpoint: expected an option of the backend; use -c, or the command's"),
        ("backend=reference", "--engine-option backend: expected an option of the backend; use --backend"),
        ("max_num_tiles=4", "--engine-option max_num_tiles: expected an option of the backend; use --max-num-tiles"),
        ("vision_backend=onnx", "--engine-option vision_backend: .* use --vision-backend"),
    ],
)
def test_options_of_the_command_itself(mini: Path, option: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run("describe", PHOTO, *BOX, "-c", mini, "--backend", "reference", "--engine-option", option)


def test_options_that_a_command_leaves_to_the_engine() -> None:
    """As README has it of `bench`, and as `batch` passes a choice of its own where the user made none."""
    told = ["vision_backend=onnx", "separate_process=true", "dtype=float16"]
    found = engine_options("reference", told, False, max_num_tiles=4, separate_process=None)
    assert found == {"vision_backend": "onnx", "separate_process": True, "dtype": "float16", "max_num_tiles": 4}
    with pytest.raises(RequestError, match=r"tile_cache_gb: .* use --tile-cache-gb"):
        engine_options("vllm", ["tile_cache_gb=1"], False, tile_cache_gb=None)


def test_every_parameter_of_load_is_the_commands_or_has_an_option() -> None:
    parameters = inspect.signature(garserve.load).parameters.values()
    named = {one.name for one in parameters if one.kind is not one.VAR_KEYWORD}
    assert named | {"tile_cache_gb"} == {"checkpoint", "backend", *OWN_OPTIONS}


def test_serve_has_options_of_its_own_too() -> None:
    with pytest.raises(RequestError, match=r"--engine-option tile_cache_gb: .* use --tile-cache-gb"):
        run("serve", "tiny", "--engine-option", "tile_cache_gb=1")


def test_an_engine_option_of_endless_depth() -> None:
    deep = "[" * 200_000
    assert parse_engine_options([f"a={deep}"]) == {"a": deep}


@pytest.mark.parametrize("value", ["abc", True, 4.5, "4"])
def test_numbers_of_tiles_that_are_none(mini: Path, value: object) -> None:
    with pytest.raises(RequestError, match=f"max_num_tiles: expected a whole number of 1 to 36, got {value!r}"):
        garserve.load(mini, "reference", max_num_tiles=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["vision_backend", "vision_model"])
def test_towers_that_are_no_texts(mini: Path, option: str) -> None:
    with pytest.raises(RequestError, match=f"{option}: expected .*, got 5"):
        garserve.load(mini, "reference", **{option: 5})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["--max-body-mb", "--max-image-mb", "--drain-seconds"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_limits_without_an_end(monkeypatch: pytest.MonkeyPatch, option: str, value: str) -> None:
    monkeypatch.setattr(launch, "serve", lambda _: pytest.fail("a server was begun"))
    result = runner.invoke(app, ["serve", "tiny", option, value])
    assert result.exit_code == 2, result.output
    assert f"Invalid value for '{option}'" in result.output


def test_kernels_are_not_compiled_by_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check, "interpreted", lambda: True)
    with pytest.raises(GarserveError, match="--kernels: expected a process without TRITON_INTERPRET"):
        run("doctor", "--kernels")


def test_the_interpreter_is_seen_whatever_word_turns_it_on() -> None:
    code = "from garserve.kernels.compile_check import compile_all; next(compile_all())"
    environment = os.environ | {"TRITON_INTERPRET": "true"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "compile_check: expected a process without TRITON_INTERPRET" in done.stderr


def test_kernels_need_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "garserve.kernels.compile_check", None)
    with pytest.raises(GarserveError, match=r"--kernels: Triton cannot be imported \(.*\): pip install triton"):
        run("doctor", "--kernels")
