"""The golden vectors of the authors' code, through the reference and through vLLM, and a check of the checker."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from garserve.conformance.run import findings
from tests.conftest import SHARED

runner = CliRunner()
CASES = sorted(path.stem for path in (SHARED / "golden").glob("s*.json"))


def failures(folder: Path, backend: str, only: list[str]) -> list[str]:
    found = list(findings(folder, backend, only))  # type: ignore[arg-type]
    assert len(found) > 10
    return [str(finding) for finding in found if not finding.passed]


@pytest.mark.parametrize("case", CASES or [pytest.param("", id="none here")])
def test_reference(golden: Path, case: str) -> None:
    assert failures(golden, "reference", [case]) == []


def test_units(golden: Path, tmp_path: Path) -> None:
    for name in ("unit", "gar-tiny-random", "gar-tiny-random-nocls"):
        (tmp_path / name).symlink_to(golden / name)
    assert failures(tmp_path, "reference", []) == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GARSERVE_REPLAY", "triton"),
        ("GARSERVE_REPLAY", "cpu"),
        ("GARSERVE_REPLAY", "truth"),
        ("GARSERVE_PATCH_EMBED", "triton"),
        ("GARSERVE_PATCH_EMBED", "plain"),
    ],
)
def test_every_implementation(one_case: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    assert failures(one_case, "reference", []) == []


@pytest.mark.vllm
def test_vllm(golden: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
    assert failures(golden, "vllm", []) == []


@pytest.fixture
def one_case(golden: Path, tmp_path: Path) -> Path:
    """A folder with the smallest case, which a test may falsify."""
    name = "s07_multi1_one_tile_full_t1"
    for suffix in (".json", ".safetensors"):
        shutil.copy(golden / (name + suffix), tmp_path)
    (tmp_path / "images").symlink_to(golden / "images")
    shutil.copytree(golden / "gar-tiny-random", tmp_path / "gar-tiny-random")
    return tmp_path


def conformance(folder: Path) -> tuple[int, str]:
    import typer

    from garserve.conformance.run import command

    app = typer.Typer()
    app.command()(command)
    result = runner.invoke(app, [str(folder)])
    return result.exit_code, result.output


def test_tool_passes_and_prints_a_line_a_check(one_case: Path) -> None:
    code, output = conformance(one_case)
    assert code == 0
    assert "token ids" in output
    assert "checks passed (reference)" in output
    assert "FAIL" not in output


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("input_ids", "token ids"),
        ("mask_tiles_packed", "mask tiles"),
        ("pixel_u8_sample", "pixels"),
        ("image_features", "image features"),
        ("replay_geometric", "replay geometric"),
        ("inputs_embeds_sample", "input embeddings"),
        ("logits_released", "logits released"),
        ("tokens_geometric", "greedy tokens geometric"),
        ("roi_boxes_feature", "boxes, feature cells"),
        ("vision_out_sample", "vision tower"),
        ("mask_embeds_sample", "mask embedding"),
    ],
)
def test_tool_sees_a_falsified_array(one_case: Path, name: str, check: str) -> None:
    path = next(one_case.glob("*.safetensors"))
    arrays = load_file(path)
    name = name if name in arrays else f"{name}_sample"
    last = arrays[name].flatten()[-1:]
    last += 3 if last.is_floating_point() else 2
    save_file(arrays, path)
    code, output = conformance(one_case)
    assert code == 1
    failed = [line for line in output.splitlines() if line.startswith("FAIL")]
    assert any(check in line for line in failed), output


def test_tool_sees_a_falsified_description(one_case: Path) -> None:
    path = next(one_case.glob("s*.json"))
    data = json.loads(path.read_text())
    data["regions"][0]["bbox"][2] += 0.001
    data["tiles_w"] = 2
    path.write_text(json.dumps(data))
    code, output = conformance(one_case)
    assert code == 1
    assert "FAIL" in output


def test_tool_goes_on_after_a_case_that_cannot_run(one_case: Path) -> None:
    path = next(one_case.glob("s*.json"))
    data = json.loads(path.read_text())
    for name, change in (("s00", {"image": {**data["image"], "file": "images/gone.png"}}), ("s99", {})):
        (one_case / f"{name}.json").write_text(json.dumps({**data, "name": name, **change}))
        shutil.copy(path.with_suffix(".safetensors"), one_case / f"{name}.safetensors")
    code, output = conformance(one_case)
    assert code == 1
    assert [line.split()[1] for line in output.splitlines() if line.startswith("FAIL")] == ["s00"]
    assert "ImageError" in output
    assert "ok   s99" in output


def test_tool_with_nothing_to_check(tmp_path: Path) -> None:
    code, output = conformance(tmp_path)
    assert code == 2
    assert "no golden case found" in output
