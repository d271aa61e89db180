"""Batch: a row for every line, errors with their places, and real masks through vLLM equal to the reference."""

import json
import multiprocessing
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import garserve
from garserve.batch.run import run_job
from garserve.batch.source import Reading
from garserve.batch.source_jsonl import JsonlSource
from garserve.batch.totals import Totals
from garserve.engine import Engine
from tests.batch_data import plan_of, rows, write_requests
from tests.conftest import write_lines
from tests.echo import shared

BOX = {"box": [1, 1, 20, 20]}


def run_reference(engine: Engine, checkpoint: Path, source: Path, output: Path) -> Totals:
    return run_job(plan_of(source, output, checkpoint), lambda: shared(engine))


@pytest.fixture
def folder(tmp_path: Path, picture: np.ndarray) -> Path:
    Image.fromarray(picture).save(tmp_path / "a.png")
    mask = np.zeros(picture.shape[:2], np.uint8)
    mask[10:40, 20:60] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes((Path(garserve.__file__).parent / "data" / "coffee.jpg").read_bytes()[:4000])
    return tmp_path


def test_bad_lines_become_error_rows_and_the_others_go_on(reference: Engine, mini: Path, folder: Path) -> None:
    lines: list[object] = [
        {"id": "good", "image": "a.png", "regions": [BOX]},
        "{not json",
        {"image": "a.png", "regions": []},
        {"image": "a.png", "regions": [BOX] * 6, "question": "q"},
        {"image": "a.png", "regions": [BOX, BOX], "question": "What is <Prompt3>?"},
        {"image": "gone.png", "regions": [BOX]},
        {"image": "text.png", "regions": [BOX]},
        {"image": "cut.jpg", "regions": [BOX]},
        {"image": "a.png", "regions": [{"rle": {"size": [90, 140], "counts": "0T3"}}]},
        {"image": "a.png", "regions": [{"box": [1, float("nan"), 3, 4]}]},
        {"regions": [BOX]},
        [1, 2],
        '{"image": "a.png", "regions": [{"box": [0,0,9,9]}], "question": 7}',
        "",
        {"image": "a.png", "regions": [BOX], "max_tokens": 0},
        {"image": "a.png", "regions": [BOX], "choices": ["A. Red."]},
        '{"image": "a.png", "regions": [{"rle": {"size": [Infinity, 80], "counts": [1]}}]}',
        {"image": "a.png", "regions": [{"polygon": {"a": 1}}]},
        {"image": "a.png", "regions": [{"polygon": [{"a": 1}]}]},
        {"image": "a.png", "regions": [BOX], "questoin": "What is <Prompt0>?"},
        '{"id": "half \\ud800", "image": "a.png", "regions": [[0, 0, 9, 9]], "question": "half \\ud800"}',
        '{"image": "a.png", "regions": [{"box": [0, 0, 9, ' + "9" * 5000 + "]}]}",
        {
            "id": 5,
            "image": "a.png",
            "regions": [{"mask": "m.png"}],
            "question": "Is <Prompt0> <|eot_id|>?",
            "note": "kept out",
        },
    ]
    source = write_lines(folder / "in.jsonl", lines)
    with source.open("ab") as file:
        file.write(b"\xff\xfe\n")
    totals = run_reference(reference, mini, source, folder / "out.jsonl")
    out = rows(folder / "out.jsonl")
    assert sorted(int(row["place"].split()[1]) for row in out) == [*range(1, 14), *range(15, 25)]
    assert {row["id"] for row in out if "error" not in row} == {"good", 5}
    assert {row["id"] for row in out if "error" in row} >= {"line-2", "line-3", "half \ud800"}
    messages = {int(row["place"].split()[1]): row["error"] for row in out if "error" in row}
    for line, part in {
        2: "not JSON",
        3: "regions: expected at least one region",
        4: "at most 5 regions at once, got 6",
        5: "names <Prompt3>",
        6: "gone.png: no such file",
        7: "text.png: not an image",
        8: "cut.jpg: broken or truncated",
        9: r"rle: counts: expected runs of 12600",
        10: "box: expected finite numbers",
        11: "image: Field required",
        12: "valid dictionary",
        13: "question: Input should be a valid string",
        15: "max_tokens: expected at least 1 (and at most 1000000), got 0",
        16: "choices: only with a question",
        17: "rle: size: expected the image's [height, width] [90, 140], got [inf, 80]",
        18: "polygon: expected [[x, y], ...] or a list of such lists, got {'a': 1}",
        19: "polygon: expected [[x, y], ...] or a list of such lists, got {'a': 1}",
        20: "unknown field 'questoin', did you mean 'question'?",
        21: "question: half a character",
        22: "not JSON",
        24: "not JSON",
    }.items():
        assert part in messages[line], (line, messages[line])
    assert (totals.rows, totals.errors, totals.regions) == (23, 21, 2)


def test_a_region_that_was_not_given_can_be_asked_about_on_purpose(reference: Engine, mini: Path, folder: Path) -> None:
    asked = {"image": "a.png", "regions": [BOX], "question": "What is <Prompt3>?"}
    source = write_lines(folder / "in.jsonl", [asked, asked | {"check_names": False}, asked | {"check_names": "no"}])
    run_reference(reference, mini, source, folder / "out.jsonl")
    refused, answered, misread = sorted(rows(folder / "out.jsonl"), key=lambda row: row["id"])
    assert "names <Prompt3>, but the regions given are <Prompt0>" in refused["error"]
    assert answered["text"]
    assert "check_names" in misread["error"]


def test_the_input_is_never_overwritten(reference: Engine, mini: Path, folder: Path) -> None:
    source = write_lines(folder / "in.jsonl", [{"image": "a.png", "regions": [BOX]}])
    before = source.read_bytes()
    with pytest.raises(garserve.GarserveError, match="is the input itself"):
        run_reference(reference, mini, source, folder / "in.jsonl")
    assert source.read_bytes() == before


def test_choices_are_asked_as_the_authors_evaluation_asks(tmp_path: Path) -> None:
    line = {"image": "a.png", "regions": [BOX], "question": "Colour of <Prompt0>?", "choices": ["A. Red.", "B. Blue."]}
    (read,) = JsonlSource(write_lines(tmp_path / "in.jsonl", [line]), Reading()).records()
    assert read.options["question"] == (
        "Question: Colour of <Prompt0>?\nOptions:\nA. Red.\nB. Blue.\nAnswer with the correct option's letter directly."
    )


def test_json_lines_and_coco_give_equal_texts(reference: Engine, mini: Path, photos: Path, tmp_path: Path) -> None:
    """Real photographs with real masks, every region by itself, and the same as annotations of COCO's format."""
    lines = [json.loads(line) for line in (photos / "regions.jsonl").read_text().splitlines()]
    images = [{"id": number, "file_name": line["image"]} for number, line in enumerate(lines)]
    annotations = [
        {"id": f"line-{number + 1}/{i}", "image_id": number, "segmentation": region["rle"], "category_id": 1}
        for number, line in enumerate(lines)
        for i, region in enumerate(line["regions"])
    ]
    coco = tmp_path / "coco.json"
    coco.write_text(json.dumps({"images": images, "annotations": annotations[::-1]}))
    texts = {}
    for name, source in (("lines", photos / "regions.jsonl"), ("coco", coco)):
        reading = Reading(images=photos, each_region=name == "lines")
        plan = plan_of(source, tmp_path / name, mini, reading=reading, max_num_tiles=2)
        totals = run_job(plan, lambda: shared(reference))
        assert (totals.rows, totals.errors) == (56, 0)
        texts[name] = {row["id"]: (row["text"], row["regions"]) for row in rows(tmp_path / name)}
    assert texts["lines"] == texts["coco"]
    assert len({text for text, _ in texts["lines"].values()}) > 20


@pytest.mark.vllm
def test_real_photographs_with_real_masks(golden: Path, photos: Path, tmp_path: Path) -> None:
    """Every line gives a row; vLLM's greedy answers are the reference's, token for token."""
    pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
    outputs = {}
    for backend in ("vllm", "reference"):
        checkpoint = golden / "gar-tiny-random"
        plan = plan_of(photos / "regions.jsonl", tmp_path / backend, checkpoint, max_tokens=12, max_num_tiles=6)
        engine = garserve.load(checkpoint, backend, dtype="float32", max_num_tiles=6)  # type: ignore[arg-type]
        run_job(plan, partial(shared, engine))
        engine.close()
        outputs[backend] = sorted(rows(tmp_path / backend), key=lambda row: int(row["place"].split()[1]))
    lines = [json.loads(line) for line in (photos / "regions.jsonl").read_text().splitlines()]
    assert len(outputs["vllm"]) == len(lines) == 24
    for ours, truth, line in zip(outputs["vllm"], outputs["reference"], lines, strict=True):
        if len(line["regions"]) > 5:
            assert ours["error"] == truth["error"]
            assert f"at most 5 regions at once, got {len(line['regions'])}" in ours["error"]
        else:
            assert ours["text"] == truth["text"]
            assert ours["answer_tokens"] == 12


@pytest.mark.vllm
def test_an_engine_process_that_is_killed_is_replaced(mini: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
    source, out = write_requests(tmp_path, 60), tmp_path / "out.jsonl"
    killed = []

    def kill() -> None:
        while not (out.exists() and out.read_bytes().count(b"\n") >= 5):
            time.sleep(0.01)
        killed.extend(multiprocessing.active_children())
        for process in multiprocessing.active_children():
            process.kill()

    threading.Thread(target=kill, daemon=True).start()
    plan = plan_of(source, out, mini, in_flight=4)
    totals = run_job(plan, lambda: garserve.load(mini, separate_process=True))
    assert (len(killed), totals.engine_restarts, totals.errors) == (1, 1, 0)
    assert sorted(row["id"] for row in rows(out)) == sorted(f"r{i}" for i in range(60))
