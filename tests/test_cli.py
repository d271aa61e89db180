"""The command line: regions in every form, JSON for machines, one-line errors, the doctor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from garserve.cli import app
from garserve.cli_options import parse_engine_options
from garserve.demo import REGIONS
from garserve.errors import GarserveError, RequestError
from garserve.evaluation.score import described
from garserve.inputs.images import load_image
from garserve.inputs.processor import draw_masks
from tests.conftest import PHOTO, ROOT, write_lines
from tests.train_tiny import training_module

runner = CliRunner()


def run(*arguments: object) -> str:
    result = runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_describe_with_every_kind_of_region(mini: Path, tmp_path: Path) -> None:
    mask = tmp_path / "m.png"
    image = Image.new("L", (600, 400))
    image.paste(255, (10, 10, 60, 60))
    image.save(mask)
    rle = tmp_path / "r.json"
    rle.write_text(json.dumps({"size": [400, 600], "counts": [0, 500, 239_500]}))
    picture = tmp_path / "sub" / "out.png"
    regions = ["--box", "10,10,90,90", "--mask", mask, "--polygon", "5,5,80,5,80,80", "--box=200,200,300,300"]
    regions += ["--points", "300,200", "--scribble", "10,300,400,320", "--rle", rle, "--xywh", "5,5,20,30"]
    common = ["-c", mini, "--backend", "reference", "--max-tokens", 3, "--json"]
    found = json.loads(run("describe", PHOTO, *regions, *common, "--image-out", picture))
    assert [row["region"] for row in found] == [f"region {i}" for i in range(8)]
    assert all(row["answer_tokens"] == 3 for row in found)
    with Image.open(picture) as drawn:
        assert drawn.width > 800
        assert drawn.height > drawn.width * 0.7
    # The order is that of the command line, not that of the kinds of option.
    second = json.loads(run("describe", PHOTO, "--box", "200,200,300,300", *common))
    assert second[0]["text"] == found[3]["text"]


def test_ask(mini: Path) -> None:
    arguments = [
        "describe",
        PHOTO,
        "--box",
        "10,10,90,90",
        "--ask",
        "What is <Prompt0>?",
        "-c",
        mini,
        "--backend",
        "reference",
    ]
    assert "answer" in run(*arguments, "--max-tokens", 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--box", "1,2,3"], "box: expected 4 numbers, got 3"),
        (["--box", "a,b,c,d"], "--box: expected numbers separated by commas"),
        (["--points", "1,2,3"], "--points: expected pairs"),
        (["--rle", "/nowhere.json"], "--rle /nowhere.json: No such file"),
        (["--rle", "{"], "--rle: not JSON"),
        (["--box", "1,2,3000,4000"], r"regions\[0\]: box: .* outside the 600x400 image"),
        ([], "no region given"),
    ],
)
def test_bad_regions(mini: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(GarserveError, match=message):
        runner.invoke(
            app, ["describe", str(PHOTO), *arguments, "-c", str(mini), "--backend", "reference"], catch_exceptions=False
        )


def test_batch(mini: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"image": str(PHOTO), "regions": [{"box": [1, 1, 50, 50]}]}, "bad"])
    out = tmp_path / "out.jsonl"
    common = ["-c", mini, "--backend", "reference", "--max-tokens", 2, "--workers", 0, "--json"]
    told = [str(one) for one in ["batch", "-i", source, "-o", out, *common, "--metrics-file", tmp_path / "m.json"]]
    for rows in (2, 0):  # the second time there is nothing left
        result = runner.invoke(app, told, catch_exceptions=False)
        assert result.exit_code == 1, result.output  # one of the rows that are there is an error
        summary = json.loads(result.stdout)
        assert (summary["rows"], summary["before"], summary["errors"]) == (rows, 2 - rows, int(rows > 0))
        assert summary["errors_before"] == int(rows == 0)
        assert summary == json.loads((tmp_path / "m.json").read_text())
        assert len(out.read_text().splitlines()) == 2
    with pytest.raises(GarserveError, match="max_tokens 2, now it is 3"):
        run("batch", "-i", source, "-o", out, "-c", mini, "--max-tokens", 3)
    assert "2 rows" in run("report", out, "-o", tmp_path / "r.html")
    with pytest.raises(GarserveError, match="no such folder"):
        run("batch", "-i", source, "-o", tmp_path / "no" / "out", "-c", mini)
    for option in ("--coco", "--parquet", "--metrics-file"):
        words = rf"{option} .*out\.jsonl: is the same file as --output|--coco: expected"
        with pytest.raises(GarserveError, match=words):
            run("batch", "-i", source, "-o", out, "-c", mini, option, out)
    with pytest.raises(GarserveError, match="expected it without --each-region"):
        run("batch", "-i", source, "-o", out, "-c", mini, "--coco", tmp_path / "c.json", "--each-region")
    with pytest.raises(GarserveError, match="--engine-cpus and --engine-gpus: only with --ray"):
        run("batch", "-i", source, "-o", out, "-c", mini, "--engines", 2)


@pytest.mark.parametrize("told", [["--ray"], ["--ray", "--engines", "2"], ["--ray", "local"], ["--ray=local"]])
def test_batch_on_ray_with_and_without_an_address(mini: Path, tmp_path: Path, told: list[str]) -> None:
    """Each gets as far as the output, or as Ray where it is not installed; no cluster is joined."""
    source = write_lines(tmp_path / "in.jsonl", [{"image": str(PHOTO), "regions": [{"box": [1, 1, 50, 50]}]}])
    (tmp_path / "out").write_text("")
    with pytest.raises(GarserveError, match=r"expected a folder of parts, got a file|--ray needs Ray: pip install"):
        run("batch", "-i", source, *told, "-o", tmp_path / "out", "-c", mini, "--backend", "reference")


def test_errors_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from garserve.cli import main; main()",
        "describe",
        str(PHOTO),
        "--box",
        "1,1,9,9",
    ]
    done = subprocess.run([*command, "-c", str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: checkpoint file missing")
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_is_quick_and_names_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from garserve.cli import main; main()", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    for name in ("describe", "batch", "report", "doctor", "demo", "eval", "export", "encode"):
        assert name in done.stdout
    assert "| torch\n" not in done.stderr


def test_demo_draws_a_picture(tmp_path: Path) -> None:
    """Three sentences and a relation, each true by the definitions of tools/train_tiny/attributes.py."""
    printed = run("demo", "--backend", "reference", "-o", tmp_path).splitlines()
    attributes = training_module("attributes")
    image = load_image(PHOTO)
    masks = draw_masks(list(REGIONS.values()), *image.shape[:2])
    for line, name, mask in zip(printed[:3], REGIONS, masks, strict=True):
        assert name in line
        for attribute, word in vars(attributes.labels(image, mask)).items():
            assert word in (None, described(attribute, line.split(")", 1)[1])), (line, attribute)
    assert f"<Prompt0> is {attributes.relation(masks[0], masks[1])} <Prompt1>." in printed[3]
    assert (tmp_path / "regions.png").stat().st_size > 50_000


@pytest.mark.vllm
def test_doctor() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
    checks = {check["name"]: check for check in json.loads(run("doctor", "--json"))}
    assert checks["vLLM sees the plugin"]["passed"] is True
    assert checks["replay against float64 loops"]["passed"] is True
    assert checks["garserve"]["value"] == "0.1.0"


def test_engine_options() -> None:
    assert parse_engine_options(["a=1", "b=x", 'c={"d": true}']) == {"a": 1, "b": "x", "c": {"d": True}}
    with pytest.raises(RequestError, match="expected NAME=VALUE"):
        parse_engine_options(["nothing"])
