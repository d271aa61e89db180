"""`--retry-errors`: what goes is asked again, or was repaired; error rows of another input stay."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from garserve.batch.parts import Parts
from garserve.batch.source import Reading
from tests.batch_data import plan_of, rows, run_echo, write_requests
from tests.conftest import write_lines
from tests.test_batch_reading import write_tar

BOX = [1, 1, 20, 20]


def errors(output: Path) -> set[Any]:
    return {row["id"] for row in rows(output) if "error" in row}


def without_pictures(folder: Path, name: str, count: int) -> Path:
    lines = [{"id": f"{name}{number}", "image": f"{name}.png", "regions": [BOX]} for number in range(count)]
    return write_lines(folder / f"{name}.jsonl", lines)


@pytest.mark.parametrize("shrunk", [False, True])
def test_error_rows_that_the_input_does_not_have_stay(mini: Path, tmp_path: Path, shrunk: bool) -> None:
    """Two inputs in one output, or one input that has become shorter."""
    first, out = without_pictures(tmp_path, "a", 3), tmp_path / "out.jsonl"
    assert run_echo(first, out, mini).errors == 3
    second = without_pictures(tmp_path, "a" if shrunk else "b", 2)
    if not shrunk:
        assert run_echo(second, out, mini).errors == 2
    stay = {"a2"} if shrunk else {"a0", "a1", "a2"}
    Image.new("RGB", (30, 30)).save(tmp_path / second.with_suffix(".png").name)
    totals = run_echo(second, out, mini, retry_errors=True)
    assert (totals.rows, totals.errors, totals.errors_before) == (2, 0, len(stay))
    assert errors(out) == stay


def test_error_rows_of_another_input_stay_in_parts(mini: Path, tmp_path: Path) -> None:
    plan = plan_of(without_pictures(tmp_path, "b", 2), tmp_path / "out", mini)
    with Parts(plan.output, rows_a_part=2) as parts:
        for name in ("a0", "b0", "a1", "b1", "a2"):
            parts.append({"id": name, "error": "gone"})
        plan.drop_errors(plan.open_source(), parts)
        assert [row["id"] for row in parts.rows()] == ["a0", "a1", "a2"]


def test_rows_of_what_was_repaired_go(mini: Path, tmp_path: Path) -> None:
    """A line that could not be read has its place as id, and one that is asked by its regions is split by now."""
    write_requests(tmp_path, 1)
    good, out = {"image": "0.png", "regions": [BOX]}, tmp_path / "out.jsonl"
    source = write_lines(tmp_path / "in.jsonl", [good | {"id": 5, "seed": "?"}, "{", good])
    reading = Reading(each_region=True)
    assert run_echo(source, out, mini, reading=reading).errors == 2
    assert errors(out) == {5, "line-2"}
    write_lines(source, [good | {"id": 5}, good | {"id": "x"}, good])
    assert run_echo(source, out, mini, reading=reading, retry_errors=True).rows == 2
    assert {row["id"] for row in rows(out)} == {"5/0", "x/0", "line-3/0"}


def test_rows_of_files_that_were_repaired_go(mini: Path, tmp_path: Path) -> None:
    """A broken annotation file is an error row by its name, and a picture without a mask by its own."""
    source, out = tmp_path / "in", tmp_path / "out.jsonl"
    source.mkdir()
    Image.new("RGB", (30, 30)).save(source / "sa 1.jpg")
    annotations = [{"id": number, "bbox": [1, 1, 9, 9]} for number in range(2)]
    whole = json.dumps({"image": {"file_name": "sa 1.jpg"}, "annotations": annotations})
    (source / "sa 1.json").write_text(whole)
    (source / "sa 2.json").write_text("[]")
    run_echo(source, out, mini)
    assert errors(out) == {"sa-2.json"}
    (source / "sa 2.json").write_text(whole.replace('"id": ', '"id": 1'))
    assert run_echo(source, out, mini, retry_errors=True).rows == 2
    assert {row["id"] for row in rows(out)} == {0, 1, 10, 11}


def test_rows_of_pictures_whose_masks_were_missing_go(mini: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out.jsonl"
    source.mkdir()
    Image.new("RGB", (30, 30)).save(source / "a b.jpg")
    run_echo(source, out, mini)
    assert errors(out) == {"a b"}
    values = np.zeros((30, 30), np.uint8)
    values[2:9, 2:9], values[12:20, 12:20] = 7, 9
    Image.fromarray(values).save(source / "a b.png")
    assert run_echo(source, out, mini, retry_errors=True).rows == 2
    assert {row["id"] for row in rows(out)} == {"a b:7", "a b:9"}


def test_rows_of_samples_whose_files_lay_apart_go(mini: Path, tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (30, 30)).save(picture, "PNG")
    request = json.dumps({"regions": [BOX]}).encode()
    content = {"png": picture.getvalue(), "mask.png": picture.getvalue(), "json": request}
    files = {f"{name}.{kind}": content[kind] for kind in content for name in ("a 0", "b")}
    source, out = tmp_path / "s.tar", tmp_path / "out.jsonl"
    run_echo(write_tar(source, files), out, mini)
    assert errors(out) == {f"s/{name}{kind}" for name in ("a 0", "b") for kind in (".png", ".mask.png", "")}
    write_tar(source, dict(sorted(files.items())))
    assert run_echo(source, out, mini, retry_errors=True).rows == 2
    assert {row["id"] for row in rows(out)} == {"s/a 0", "s/b"}
    assert errors(out) == set()
