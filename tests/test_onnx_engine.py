"""The exported tower and encoded images in engines: the same answers as the checkpoint's own tower gives."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from garserve.export import fastest
from garserve.export.choice import Choice, choose_vision
from PIL import Image
from typer.testing import CliRunner

import garserve
from garserve.batch.run import run_job
from garserve.batch.sources import RequestLine
from garserve.checkpoint import TINY, Checkpoint, resolve
from garserve.cli import app
from garserve.engine import Engine
from garserve.errors import InputError, OnnxError, RequestError
from garserve.evaluation.ablation import without
from garserve.evaluation.part import Part
from garserve.evaluation.questions import read_questions
from garserve.evaluation.run import evaluate
from garserve.inputs.encoded import EncodedImage
from garserve.inputs.request import RegionRequest
from garserve.model.onnx_vision import OnnxVision
from tests.batch_data import plan_of, rows
from tests.conftest import PHOTO, ROOT, write_lines
from tests.echo import shared
from tests.onnx_models import tiny_models
from tests.requests_mix import REGIONS

pytest.importorskip("onnx", reason="ONNX is not installed (pip install garserve[onnx])")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed (pip install garserve[onnx])")

QUESTIONS = 40
BOX, OTHER = {"box": [480, 300, 540, 395]}, {"box": [84, 100, 170, 300]}


@pytest.fixture(scope="module")
def torch_tower() -> Iterator[Engine]:
    with garserve.load(backend="reference", batch_size=8, tile_cache_gb=0.1) as engine:
        yield engine


@pytest.fixture(scope="module")
def onnx_tower() -> Iterator[Engine]:
    with garserve.load(
        backend="reference", batch_size=8, tile_cache_gb=0.1, vision_backend="onnx:cpu", vision_model=tiny_models()
    ) as engine:
        yield engine


def test_the_reference_says_the_same_with_either_tower(torch_tower: Engine, onnx_tower: Engine) -> None:
    questions = read_questions(limit=QUESTIONS)
    encoder = onnx_tower.backend.model.encoder  # type: ignore[attr-defined]
    assert isinstance(encoder.vision, OnnxVision)
    assert not list(encoder.parameters()), "the weights of the torch tower are not loaded"
    one, other = (evaluate(engine, questions) for engine in (torch_tower, onnx_tower))
    assert [judged.text for judged in one.judged] == [judged.text for judged in other.judged]
    assert torch_tower.tile_counts == onnx_tower.tile_counts, "tiles are placed alike"
    assert onnx_tower.tile_counts.computed > 0


def test_the_mask_of_an_exported_tower_cannot_be_taken_out(onnx_tower: Engine) -> None:
    with pytest.raises(RequestError, match="the torch tower only"), without(Part.mask, onnx_tower):
        pass


@pytest.mark.parametrize(
    ("backend", "model", "message"),
    [
        ("tensorflow", None, "vision_backend: expected torch, onnx or onnx:PROVIDER, got 'tensorflow'"),
        ("onnx:", None, "vision_backend: expected torch, onnx or onnx:PROVIDER, got 'onnx:'"),
        ("torch", "somewhere", "vision_model: expected vision_backend onnx, got torch"),
        ("onnx:Abacus", "somewhere", "onnx:Abacus: this ONNX Runtime has no such provider"),
        ("onnx", "/nowhere", "nowhere: no such file; expected a model written by"),
    ],
)
def test_towers_that_there_are_not(backend: str, model: str | None, message: str) -> None:
    with pytest.raises(garserve.GarserveError, match=message):
        garserve.load(backend="reference", vision_backend=backend, vision_model=model)


@pytest.mark.parametrize("backend", ["reference", "vllm"])
def test_another_checkpoints_tower_is_refused_before_anything_starts(mini: Path, backend: str) -> None:
    with pytest.raises(OnnxError, match=r"vision.onnx: exported from another checkpoint"):
        garserve.load(mini, backend, vision_model=tiny_models())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exported_once(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Choice | None]:
    """A cache, empty before, and what was chosen as its first use."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GARSERVE_CACHE", str(cache))
        return cache, choose_vision(Checkpoint.open(mini), "onnx")


def test_a_tower_is_exported_on_first_use_and_kept(
    mini: Path, exported_once: tuple[Path, Choice | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, first = exported_once
    monkeypatch.setenv("GARSERVE_CACHE", str(cache))
    assert first is not None
    written = first[0].stat().st_mtime_ns
    assert first[0].is_relative_to(cache)
    assert choose_vision(Checkpoint.open(mini), "onnx:CPU") == first
    assert first[0].stat().st_mtime_ns == written
    assert choose_vision(Checkpoint.open(mini)) is None, "a small tower stays in torch"


def test_the_faster_tower_is_measured_once_and_chosen(
    mini: Path,
    exported_once: tuple[Path, Choice | None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache, _ = exported_once
    monkeypatch.setenv("GARSERVE_CACHE", str(cache))
    monkeypatch.setattr(fastest, "LEAST_WEIGHTS", 0)
    checkpoint = Checkpoint.open(mini)
    measured = choose_vision(checkpoint, dtype=torch.bfloat16)
    (kept,) = cache.rglob("fastest-bfloat16.json")
    record = json.loads(kept.read_text())
    assert min(record["seconds"].values()) > 0
    assert (measured is None) == (record["seconds"]["torch"] < fastest.LEAST_GAIN * record["seconds"]["onnx"])
    assert "measuring once" in caplog.text
    caplog.clear()
    for seconds, chosen in (({"torch": 2, "onnx": 1}, True), ({"torch": 1.05, "onnx": 1}, False)):
        kept.write_text(json.dumps(record | {"seconds": seconds}))
        assert (choose_vision(checkpoint, dtype="bfloat16") is not None) == chosen
    assert not caplog.text, "what was kept is believed"
    kept.write_text(json.dumps(record | {"conditions": {}, "seconds": {"torch": -1, "onnx": 1}}))
    choose_vision(checkpoint, dtype="bfloat16")
    assert json.loads(kept.read_text())["seconds"]["torch"] > 0, "of another machine: measured anew"


@pytest.mark.parametrize(("seconds", "chosen"), [({"torch": 2, "onnx": 1}, True), ({"torch": 1, "onnx": 2}, False)])
def test_what_was_measured_counts_where_it_cannot_be_kept(
    mini: Path,
    exported_once: tuple[Path, Choice | None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seconds: dict[str, float],
    chosen: bool,
) -> None:
    """As in a cache that came with an image, and is mounted read-only."""
    cache, first = exported_once
    assert first is not None
    monkeypatch.setenv("GARSERVE_CACHE", str(cache))
    monkeypatch.setattr(fastest, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(fastest, "_seconds", lambda *_: seconds)
    blocked = first[0].parent / f"fastest-float16.json.{os.getpid()}"
    blocked.mkdir(exist_ok=True)  # in the place of the file that is written first
    found = choose_vision(Checkpoint.open(mini), dtype="float16")
    blocked.rmdir()
    assert found == (first if chosen else None)
    assert "what was measured cannot be kept" in caplog.text
    assert "the tower stays in torch" not in caplog.text
    assert not list(cache.rglob("fastest-float16.json"))


def test_without_room_for_an_export_the_tower_stays_in_torch(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GARSERVE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(fastest, "LEAST_WEIGHTS", 0)
    assert choose_vision(Checkpoint.open(mini)) is None
    assert "the tower stays in torch" in caplog.text


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `garserve encode`, from requests that are good and bad."""
    folder = tmp_path_factory.mktemp("encoded")
    lines: list[object] = [
        {"id": "a", "image": str(PHOTO), "regions": [BOX]},
        {
            "id": "b",
            "image": str(PHOTO),
            "regions": [BOX, OTHER],
            "question": "Where is <Prompt0> relative to <Prompt1>?",
        },
        {"id": "c", "image": str(PHOTO), "regions": [BOX, OTHER], "question": "What colour is it?", "focus": [1]},
        {"id": "d", "image": "nowhere.png", "regions": [BOX]},
        "{",
    ]
    source = write_lines(folder / "in.jsonl", lines)
    arguments = ["encode", "-i", str(source), "-o", str(folder / "out"), "--vision-model", str(tiny_models()), "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 1
    summary = json.loads(result.stdout)
    assert (summary["rows"], summary["errors"], summary["files"]) == (5, 2, 2)
    assert summary["tiles_computed"] < summary["tiles"]
    return folder


def requests(path: Path) -> list[RegionRequest]:
    return [RequestLine.model_validate(json.loads(line)).request(path.parent, 40) for line in path.open()]


def test_engines_answer_from_embeddings_as_from_pixels(torch_tower: Engine, encoded: Path) -> None:
    from_files = requests(encoded / "out" / "requests.jsonl")
    assert all(isinstance(request.image, EncodedImage) for request in from_files)
    from_pixels = requests(write_lines(encoded / "good.jsonl", (encoded / "in.jsonl").read_text().splitlines()[:3]))
    before = torch_tower.tile_counts.asked
    answers = list(torch_tower.describe_many(from_files))
    assert torch_tower.tile_counts.asked == before, "no tile is computed again"
    wanted = list(torch_tower.describe_many(from_pixels))
    assert [(one.text, one.prompt_tokens) for one in answers] == [(one.text, one.prompt_tokens) for one in wanted]
    single = from_files[0].image
    assert torch_tower.describe(single, [])[0].text == answers[0].text
    assert torch_tower.chat(single, []).say().text == answers[0].text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_answers_from_embeddings(torch_tower: Engine, encoded: Path, tmp_path: Path, workers: int) -> None:
    """Prepared here, or in a worker process and sent."""
    source = encoded / "out" / "requests.jsonl"
    plan = plan_of(source, tmp_path / "out.jsonl", resolve(TINY), max_tokens=40, workers=workers)
    totals = run_job(plan, lambda: shared(torch_tower))
    wanted = list(torch_tower.describe_many(requests(source)))
    written = {row["id"]: row for row in rows(tmp_path / "out.jsonl")}
    assert [written[name]["text"] for name in "abc"] == [one.text for one in wanted]
    assert [written[name]["prompt_tokens"] for name in "abc"] == [one.prompt_tokens for one in wanted]
    assert (totals.rows, totals.errors, totals.regions) == (3, 0, 4)


def test_bad_lines_are_named(encoded: Path) -> None:
    errors = [json.loads(line) for line in (encoded / "out" / "errors.jsonl").open()]
    assert [error["place"] for error in errors] == ["line 4", "line 5"]
    assert "no such file" in errors[0]["error"]


def test_embeddings_that_an_engine_cannot_take(torch_tower: Engine, encoded: Path, tmp_path: Path) -> None:
    path = next(iter((encoded / "out").glob("*.safetensors")))
    good = EncodedImage.load(path)
    count = len(good.regions)
    for change, message in (
        ({"checkpoint": "0" * 32}, "computed by another checkpoint: expected the vision half"),
        ({"box_scale": "released"}, "box_scale: expected geometric"),
        ({"image": good.image[:-1]}, r"encoded image: expected \[T·49, 192\], got"),
        ({"regions": good.regions[:, :5]}, r"encoded regions: expected \[R, 49, 192\]"),
        ({"regions": good.regions.half()}, "expected one float dtype"),
    ):
        with pytest.raises(InputError, match=message):
            torch_tower.ask(replace(good, **change), [], "What is this?")
    with pytest.raises(RequestError, match="an encoded image holds its own; expected none, got 1"):
        torch_tower.ask(good, [BOX], "What is this?")
    with pytest.raises(RequestError, match=r"names <Prompt4>, but the regions given are"):
        torch_tower.ask(good, [], "What is <Prompt4>?")
    with pytest.raises(RequestError, match=r"focus: expected positions 0 to"):
        torch_tower.ask(good, [], "What?", focus=[count])
    with pytest.raises(InputError, match="no such file"):
        EncodedImage.load(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="broken or truncated"):
        EncodedImage.load(tmp_path / "cut.safetensors")
    with pytest.raises(InputError, match="expected a file of `garserve encode`"):
        EncodedImage.load(Checkpoint.open(TINY).folder / "model.safetensors")


def test_the_example_needs_no_torch(tmp_path: Path, torch_tower: Engine) -> None:
    mask = np.zeros((400, 600), np.uint8)
    mask[300:395, 480:540] = 200
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = tmp_path / "embeddings.npz"
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.modules['garserve'] = None;"
        f"sys.argv = ['x', {str(tiny_models())!r}, {str(PHOTO)!r}, {str(tmp_path / 'mask.png')!r}, {str(out)!r}];"
        f"runpy.run_path({str(ROOT / 'examples' / 'onnx_vision.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = np.load(out)
    items = torch_tower.processor(RegionRequest(PHOTO, [garserve.Region.from_mask(mask > 0)])).items
    rows = torch_tower.backend.model.encoder.encode(items)  # type: ignore[attr-defined]
    ours = torch.from_numpy(made["image"]).flatten(0, 1), torch.from_numpy(made["region"])
    for name, one, wanted in zip(("image", "region"), ours, rows, strict=True):
        assert one.shape == wanted.shape
        near = torch.nn.functional.cosine_similarity(one, wanted, dim=1)
        assert near.mean() > 0.99, name  # Pillow's bicubic is not the processor's


@pytest.mark.vllm
def test_vllm_says_the_same_with_the_exported_tower(torch_tower: Engine, encoded: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
    questions = read_questions(limit=QUESTIONS)
    wanted = [judged.text for judged in evaluate(torch_tower, questions).judged]
    mixed = [*requests(encoded / "out" / "requests.jsonl"), RegionRequest(PHOTO, REGIONS, "What is <Prompt0>?")]
    spoken = [answer.text for answer in torch_tower.describe_many(mixed)]
    with garserve.load(vision_model=tiny_models(), vision_backend="onnx:CPU") as engine:
        assert [judged.text for judged in evaluate(engine, questions).judged] == wanted
        assert [answer.text for answer in engine.describe_many(mixed)] == spoken


@pytest.mark.vllm
def test_vllm_says_the_same_about_photographs_with_masks(photos: Path, torch_tower: Engine) -> None:
    """Greedy texts in float32, of every region by itself and of each set of up to five: equal with both towers.

    Of every second photograph, and of the one with the most regions.
    """
    pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
    asked = []
    records = [json.loads(line) for line in (photos / "regions.jsonl").open()]
    most = max(records, key=lambda record: len(record["regions"]))
    for record in [*[one for one in records[::2] if one is not most], most]:
        for region in record["regions"]:
            asked.append(RegionRequest(photos / record["image"], [region], max_tokens=40))
        if len(record["regions"]) <= 5:
            asked.append(
                RegionRequest(photos / record["image"], record["regions"], "Where is <Prompt0>?", max_tokens=40)
            )
    texts = []
    for model in (None, tiny_models()):
        with garserve.load(vision_model=model) as engine:
            texts.append([answer.text for answer in engine.describe_many(asked)])
    assert len(asked) > 40
    assert texts[0] == texts[1]
