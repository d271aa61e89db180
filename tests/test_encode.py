"""`garserve encode` line by line: ids, odd lines and the files that it leaves. The tower is a stand-in of zeros."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from PIL import Image
from safetensors import safe_open

from garserve.batch.encode import FileEncoder, check_folder, run_encode
from garserve.batch.source import Reading
from garserve.batch.source_jsonl import JsonlSource
from garserve.checkpoint import TINY, Checkpoint
from garserve.errors import GarserveError, RequestError
from garserve.inputs.encoded import EncodedImage
from garserve.inputs.processor import Processor
from garserve.inputs.request import RegionRequest
from tests.conftest import PHOTO, write_lines

BOX = {"box": [480, 300, 540, 395]}
GOOD: dict[str, Any] = {"image": str(PHOTO), "regions": [BOX]}


class Zeros:
    """What FileEncoder needs of a RegionEncoder."""

    def encode(self, items: list[Any]) -> list[torch.Tensor]:
        return [torch.zeros(2, 3) for _ in items]


class Noting(FileEncoder):
    """Keeps the requests that it was given; fails as it is told at one of them."""

    def __init__(self, folder: Path, failure: BaseException | None = None, at: int = 0, tower: str = "") -> None:
        opened = Checkpoint.open(TINY)
        processor = Processor(opened.folder, opened.config)
        super().__init__(Zeros(), processor, "0" * 32, folder, tower=tower)  # type: ignore[arg-type]
        self.requests: list[RegionRequest] = []
        self._failure, self._at = failure, at

    def encode(self, request: RegionRequest) -> tuple[Path, bool]:
        self.requests.append(request)
        if self._failure is not None and len(self.requests) > self._at:
            raise self._failure
        return super().encode(request)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_lines_without_an_id_keep_that_of_their_place(tmp_path: Path, out: Path) -> None:
    lines = [GOOD, "{", "", GOOD, {**GOOD, "id": None}, {**GOOD, "id": 5}, {**GOOD, "id": "5"}]
    source = write_lines(tmp_path / "in.jsonl", lines)
    done = run_encode(Noting(out), source, out)
    assert (done.rows, done.errors, done.files) == (6, 1, 1)
    keys = {record.key: record.place for record in JsonlSource(source, Reading()).records()}
    encoded = [record.key for record in JsonlSource(out / "requests.jsonl", Reading()).records()]
    assert encoded == ["line-1", "line-4", "line-5", 5, "5"] == [key for key in keys if key != "line-2"]
    assert [(row["id"], row["place"]) for row in read(out / "errors.jsonl")] == [("line-2", "line 2")]


DEEP = '{"regions": [{"polygon": ' + "[" * 600 + "[1, 2], [9, 2], [9, 9]" + "]" * 600 + "}], "


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**GOOD, "regions": [{"mask": [[1, 0], [1]]}]}, "mask: expected numbers or booleans of shape"),
        (DEEP + f'"image": "{PHOTO}"}}', r"cannot be used \(RecursionError"),
        ({**GOOD, "image": 5}, "image: Input should be a valid string"),
    ],
    ids=["ragged mask", "deep polygon", "number as image"],
)
def test_an_odd_line_leaves_the_others(line: Any, message: str, tmp_path: Path, out: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [GOOD, line, GOOD])
    assert run_encode(Noting(out), source, out).errors == 1
    assert [row["id"] for row in read(out / "requests.jsonl")] == ["line-1", "line-3"]
    (error,) = read(out / "errors.jsonl")
    assert error["id"] == "line-2"
    with pytest.raises(RequestError, match=message):
        raise RequestError(error["error"])


def test_whatever_drawing_raises_is_the_line_s_error(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [GOOD])
    for raised, message in (
        (ZeroDivisionError("x"), "cannot be used (ZeroDivisionError: x)"),
        (MemoryError(), "out of"),
    ):
        encoder = Noting(out)

        def fail(request: RegionRequest, raised: Exception = raised) -> None:
            raise raised

        monkeypatch.setattr(encoder._processor, "all_items", fail)
        assert run_encode(encoder, source, out).errors == 1
        assert read(out / "errors.jsonl")[0]["error"].startswith(message)


def test_half_a_surrogate_stays_what_it_is(tmp_path: Path, out: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{**GOOD, "id": "a\ud800"}, {**GOOD, "label": "\udfffé"}])
    assert run_encode(Noting(out), source, out).errors == 0
    first, second = read(out / "requests.jsonl")
    assert (first["id"], second["label"]) == ("a\ud800", "\udfffé")
    assert not (out / "errors.jsonl").exists()


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["stop", "full"])
def test_a_job_that_is_stopped_leaves_the_earlier_files(failure: BaseException, tmp_path: Path, out: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [GOOD, "{", GOOD])
    run_encode(Noting(out), source, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else GarserveError
    with pytest.raises(expected):
        run_encode(Noting(out, failure, at=1), source, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_file_that_cannot_be_written_ends_the_job(tmp_path: Path, out: Path) -> None:
    """A full disk is no fault of a line: rows after it would all be errors."""
    source = write_lines(tmp_path / "in.jsonl", [GOOD])
    encoder = Noting(out / "none")
    with pytest.raises(GarserveError, match=r"none/.*\.safetensors: cannot be written"):
        run_encode(encoder, source, out)
    assert list(out.iterdir()) == []


def test_each_tower_has_files_of_its_own(tmp_path: Path, out: Path) -> None:
    """What another one has computed is not taken for its features; files from before towers were noted still are."""
    source = write_lines(tmp_path / "in.jsonl", [GOOD])
    towers = ("int8 dynamic", "", "fp16", "int8 dynamic", "")
    written = [run_encode(Noting(out, tower=tower), source, out).files for tower in towers]
    assert written == [1, 1, 1, 0, 0]
    files = {EncodedImage.load(path).tower: path for path in out.glob("*.safetensors")}
    assert set(files) == {"int8 dynamic", "", "fp16"}
    with safe_open(files[""], framework="pt") as file:
        assert set(file.metadata()) == {"format", "checkpoint", "box_scale"}
    encoder = Noting(out)
    assert run_encode(encoder, source, out).errors == 0
    digest = blake3(b"0" * 32)
    for item in encoder._processor.all_items(encoder.requests[0]):
        digest.update(item.hash.encode())
    assert files[""].stem == digest.hexdigest(16)


@pytest.mark.parametrize("name", ["requests.jsonl", "errors.jsonl"])
def test_the_input_is_not_written_over(name: str, out: Path) -> None:
    with pytest.raises(RequestError, match="is the input itself"):
        check_folder(write_lines(out / name, [GOOD]), out)


def test_a_mask_may_name_its_value(tmp_path: Path, out: Path) -> None:
    height, width = np.asarray(Image.open(PHOTO)).shape[:2]
    labels = np.zeros((height, width), np.uint8)
    labels[10:20, 30:50], labels[40:50, 30:50] = 7, 8
    Image.fromarray(labels).save(tmp_path / "labels.png")
    source = write_lines(tmp_path / "in.jsonl", [{**GOOD, "regions": [{"mask": "labels.png", "value": 7}]}])
    encoder = Noting(out)
    assert run_encode(encoder, source, out).errors == 0
    (region,) = encoder.requests[0].parsed_regions()
    assert (region.mask(height, width) == (labels == 7)).all()
