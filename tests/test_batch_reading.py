"""Reading inputs: what is damaged, misnamed or no input at all says so, and costs no more than it has to."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from garserve.batch import source_coco
from garserve.batch.filters import Filters, region_area
from garserve.batch.ledger import Ledger
from garserve.batch.lines import count_lines
from garserve.batch.outputs import check_apart, check_coco, check_parquet
from garserve.batch.prepare import encoded, image_content
from garserve.batch.record import Id, Record
from garserve.batch.selection import Selection
from garserve.batch.source import Format, Reading
from garserve.batch.sources import detect, open_source
from garserve.errors import RequestError
from garserve.inputs.regions import Region
from tests.batch_data import rows, run_echo
from tests.conftest import write_lines

BOX = {"box": [1, 1, 20, 20]}
PNG = "data:image/png;base64,"
RLE = encoded(np.ones((4, 5), bool))


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def shard_files(count: int) -> dict[str, bytes]:
    request = json.dumps({"regions": [BOX]}).encode()
    pairs = ((f"{number}.jpg", f"{number}.json") for number in range(count))
    return {name: content for jpg, js in pairs for name, content in ((jpg, b"x" * 700), (js, request))}


def asked(path: Path, form: Format | None = None, **filters: Any) -> list[Record]:
    """Return the records that a job would answer."""
    ledger = Ledger()
    bundles = Selection(open_source(path, form), Filters(**filters)).bundles(ledger)
    return [record for bundle in bundles for record in bundle.records]


def parquet_writer() -> Callable[[Path, dict[str, list[Any]]], Path]:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install garserve[parquet])")
    import pyarrow.parquet as parquet

    def write(path: Path, columns: dict[str, list[Any]]) -> Path:
        parquet.write_table(arrow.table(columns), path, row_group_size=2)
        return path

    return write


# Of the four members of two samples, each 512 bytes of header and 1,024 or 512 of content, the third's header.
THIRD = 512 + 1024 + 512 + 512


def damaged(content: bytes, how: str) -> bytes:
    if how == "checksum":
        return content[:THIRD] + b"\xff" * 20 + content[THIRD + 20 :]
    if how == "one block of zeros":
        return content[:THIRD] + bytes(512) + content[THIRD + 512 :]
    if how == "many blocks of zeros":
        return content[:THIRD] + bytes(1536) + content[THIRD + 1536 :]
    return content[: THIRD + 100]


@pytest.mark.parametrize("how", ["checksum", "one block of zeros", "many blocks of zeros", "cut in a header"])
def test_a_tar_that_ends_too_early_has_an_error(tmp_path: Path, how: str) -> None:
    path = write_tar(tmp_path / "shard.tar", shard_files(2))
    path.write_bytes(damaged(path.read_bytes(), how))
    good, bad = open_source(path).records()
    assert (good.key, good.error) == ("shard/0", None)
    assert bad.key == "shard.tar"
    assert f"at byte {THIRD}" in str(bad.error)


def test_a_tar_may_end_in_all_ways_that_writers_know(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "shard.tar", shard_files(2))
    content = path.read_bytes()
    end = 2 * THIRD
    assert content[end:].strip(b"\0") == b""
    for tail in (b"", bytes(512), bytes(1024), bytes(1024) + b"rest of a tape" * 99, bytes(1 << 20)):
        path.write_bytes(content[:end] + tail)
        assert [record.error for record in open_source(path).records()] == [None, None]


def test_names_in_a_tar_that_belong_to_no_sample_are_passed(tmp_path: Path) -> None:
    """A tar made on a Mac has a ._NAME before each NAME."""
    files = {"README": b"Hello", ".DS_Store": b"?", "x/LICENSE": b"MIT"}
    for name, content in shard_files(2).items():
        files |= {f"x/._{name}": b"\0\5\x16\7", f"x/{name}": content}
    records = asked(write_tar(tmp_path / "mac.tar", files))
    assert [(record.key, record.error) for record in records] == [("mac/x/0", None), ("mac/x/1", None)]


def test_a_tar_of_sa1b(tmp_path: Path) -> None:
    described = {"image": {"file_name": "sa_1.jpg"}, "annotations": [{"id": 7, "segmentation": RLE, "area": 20}, 5]}
    path = write_tar(tmp_path / "sa.tar", {"./sa_1.jpg": b"pixels", "./sa_1.json": json.dumps(described).encode()})
    good, bad = open_source(path).records()
    assert (good.id, good.regions, good.area, good.error) == (7, ({"rle": RLE},), 20.0, None)
    assert good.image_name == f"{path}::./sa_1.jpg"
    assert image_content(good.image) == b"pixels"
    assert "annotation: expected an object, got 5" in str(bad.error)


def test_many_records_of_one_place_are_named_in_one_pass(tmp_path: Path) -> None:
    class Counting(Ledger):
        asked = 0

        def first_time(self, identity: Id) -> bool:
            self.asked += 1
            return super().first_time(identity)

    class Repeated:
        path, total = tmp_path, None

        def records(self) -> Any:
            return iter([Record("same place", error="bad")] * 200)

    ledger = Counting()
    bundles = Selection(Repeated(), Filters()).bundles(ledger)
    keys = [record.key for bundle in bundles for record in bundle.records]
    assert keys == ["same-place", *(f"same-place-again-{number}" for number in range(2, 201))]
    assert ledger.asked < 1000


def test_pipes_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """Opening one would wait for a writer for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refusals: list[Callable[[], object]] = [
        lambda: open_source(pipe),
        lambda: open_source(pipe, Format.jsonl),
        lambda: detect(pipe),
        lambda: count_lines(pipe),
        lambda: check_coco(pipe, Format.coco, tmp_path / "out.json"),
    ]
    for refuse in refusals:
        with pytest.raises(RequestError, match="expected a file or a folder, got a pipe or device"):
            refuse()


def test_packed_files_are_refused(tmp_path: Path) -> None:
    for start, name in {b"\x1f\x8b\x08\0": "gzip", b"PK\x03\x04": "zip", b"(\xb5/\xfd": "zstd"}.items():
        (tmp_path / "in.jsonl").write_bytes(start + b"\0" * 50)
        for form in (None, Format.jsonl):
            with pytest.raises(RequestError, match=rf"in\.jsonl: is packed \({name}\); expected it unpacked"):
                open_source(tmp_path / "in.jsonl", form)


def test_inputs_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"image": "a.png", "regions": [BOX]}])

    def refused(*_: object) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    for read in (detect, open_source):
        with pytest.raises(RequestError, match=r"in\.jsonl: cannot be read \(Permission denied\)"):
            read(path)


@pytest.mark.parametrize("name", ["in.jsonl", "in.json", "in.txt"])
def test_formats_of_lines_too_long_to_be_held(tmp_path: Path, name: str) -> None:
    photo = PNG + "A" * 1_500_000
    content = [{"type": "image_url", "image_url": {"url": photo}}]
    openai = {"custom_id": "a", "body": {"messages": [{"role": "user", "content": content}], "regions": [BOX]}}
    lines = {Format.openai: openai, Format.jsonl: {"id": 1, "image": photo, "regions": [BOX]}}
    for form, line in lines.items():
        path = write_lines(tmp_path / name, ["", {"note": "A" * 1_200_000}, line])
        assert detect(path) is form
        assert [record.error for record in open_source(path).records()][1:] == [None]


def test_whole_files_in_one_long_line(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    for form, content in {
        Format.coco: {"info": "A" * 1_200_000, "images": [], "annotations": []},
        Format.sa1b: {"image": {"file_name": "A" * 1_200_000}, "annotations": []},
        Format.gar_bench: ["A" * 1_200_000],
    }.items():
        path.write_text(json.dumps(content))
        assert detect(path) is form


def test_a_byte_order_mark_is_passed(tmp_path: Path) -> None:
    coco = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "bbox": [1, 1, 5, 5]}]}
    sa1b = {"image": {"file_name": "a.png"}, "annotations": [{"bbox": [1, 1, 5, 5]}]}
    bench = [{"image": "a.png", "mask_rles": [RLE], "question": "What?"}]
    for form, content in {Format.coco: coco, Format.sa1b: sa1b, Format.gar_bench: bench}.items():
        path = tmp_path / f"{form}.json"
        path.write_text(json.dumps(content), encoding="utf-8-sig")
        assert detect(path) is form
        assert [record.error for record in open_source(path).records()] == [None]


def test_a_folder_of_json_is_seen_past_other_json_and_a_jobs_own_is_left_out(tmp_path: Path) -> None:
    described = {"image": {"file_name": "a.jpg"}, "annotations": [{"id": 7, "bbox": [1, 1, 5, 5]}]}
    for name in ("a.json", "z.json", "m.json"):
        (tmp_path / name).write_text('{"rows": 7}')
        (tmp_path / "out.jsonl.job.json").write_text('{"garserve": "1", "job": {}}')
    (tmp_path / "n.json").write_text(json.dumps(described))
    assert detect(tmp_path) is Format.sa1b
    records = list(open_source(tmp_path).records())
    assert [record.id for record in records] == [None, None, 7, None]
    assert not any("job.json" in record.place for record in records)


def test_outputs_that_would_be_input_the_next_time_are_refused(tmp_path: Path) -> None:
    described = {"image": {"file_name": "a.jpg"}, "annotations": []}
    (tmp_path / "sa_1.json").write_text(json.dumps(described))
    (tmp_path / "other").mkdir()
    for option, name in (("metrics_file", "m.json"), ("output", "out.json"), ("parquet", "out.parquet")):
        with pytest.raises(RequestError, match=rf"--{option.replace('_', '-')} .*{name}: the input is every \.\w+ in"):
            check_apart(input=tmp_path, **{option: tmp_path / "other" / ".." / name})
        check_apart(input=tmp_path, **{option: tmp_path / "other" / name})
    check_apart(input=tmp_path, output=tmp_path / "out.jsonl")
    write_tar(tmp_path / "a.tar", {})
    check_apart(input=tmp_path, metrics_file=tmp_path / "m.json")  # of a folder of tars no JSON is read


def test_pictures_without_masks_are_errors_and_masks_are_none(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.jpg", "c.png"):
        Image.new("L", (9, 9), 255).save(tmp_path / name)
    records = {record.key: record for record in asked(tmp_path)}
    assert set(records) == {"a", "b", "c"}
    assert records["c"].error is None
    assert records["c"].image_name.endswith("c.jpg")
    for name in ("a", "b"):
        assert "mask: expected a PNG of this name" in str(records[name].error)


@pytest.mark.parametrize("form", [Format.webdataset, Format.sa1b, Format.folder, Format.coco, Format.gar_bench])
def test_inputs_without_a_request_are_refused(tmp_path: Path, form: Format) -> None:
    (tmp_path / "notes.txt").write_text("Hello")
    path = tmp_path
    if form in (Format.coco, Format.gar_bench):
        path = tmp_path / "in.json"
        path.write_text("[1, 2]" if form is Format.coco else '{"a": 1}')
    with pytest.raises(RequestError, match="expected a request, found none"):
        asked(path, form)


def test_what_filters_leave_may_be_nothing_but_categories_have_to_exist(tmp_path: Path) -> None:
    boxes = [{"id": number, "image_id": 1, "category_id": number, "bbox": [1, 1, 5, 5]} for number in (1, 2, 3)]
    kinds = [{"id": 1, "name": "cup"}, {"id": 2, "name": "spoon"}, {"id": 9, "name": "unused"}]
    coco = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": boxes, "categories": kinds}
    path = tmp_path / "c.json"
    path.write_text(json.dumps(coco))
    with pytest.raises(RequestError, match=r"--category: 'spon' is no category of .*c\.json, did you mean 'spoon'\?"):
        asked(path, categories=frozenset({"cup", "spon"}))
    for name, found in (("cup", [1]), ("3", [3]), ("unused", [])):  # 3 has no name in the file
        assert [record.id for record in asked(path, categories=frozenset({name}))] == found
    assert asked(path, min_area=1000) == []


def test_folders_that_are_named_have_to_exist(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"image": "a.png", "regions": [BOX]}])
    for reading, option in ((Reading(images=tmp_path / "gone"), "images"), (Reading(masks=path), "masks")):
        with pytest.raises(RequestError, match=f"--{option} .*: no such folder"):
            open_source(path, reading=reading)


def test_images_beside_the_folder_of_annotations(tmp_path: Path) -> None:
    """As CVAT writes them."""
    for name in ("annotations", "images"):
        (tmp_path / name).mkdir()
    (tmp_path / "images" / "a.png").touch()
    coco = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "bbox": [1, 1, 5, 5]}]}
    path = tmp_path / "annotations" / "instances_default.json"
    path.write_text(json.dumps(coco))
    (record,) = open_source(path).records()
    assert record.image == str(tmp_path / "images" / "a.png")


def test_an_image_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(3)]
    boxes = [{"id": number, "image_id": number % 3, "bbox": [1, 1, 5, 5]} for number in range(30)]
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes}))
    looked: list[str] = []
    monkeypatch.setattr(source_coco, "located", lambda name, folders: looked.append(name) or f"/{name}")
    records = list(open_source(path).records())
    assert looked == ["0.png", "1.png", "2.png"]
    assert all(record.image == f"/{int(str(record.id)) % 3}.png" for record in records)


def test_images_above_a_file_named_without_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("annotations", "val2017"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "val2017" / "a.png")
    coco = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "bbox": [1, 1, 5, 5]}]}
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(coco))
    for folder, path in (("annotations", "instances_val2017.json"), (".", "annotations/instances_val2017.json")):
        monkeypatch.chdir(tmp_path / folder)
        (record,) = asked(Path(path))
        assert os.path.abspath(str(record.image)) == str(tmp_path / "val2017" / "a.png")


def test_a_palette_does_not_turn_a_mask_of_a_folder_inside_out(tmp_path: Path) -> None:
    """Values of such masks mark regions, whatever colours they have; 0 is the background."""
    values = np.zeros((10, 10), np.uint8)
    values[2:5, 2:5] = 1
    for name, palette in (("black", [0, 0, 0, 255, 0, 0]), ("white", [255, 255, 255, 0, 0, 0])):
        Image.new("RGB", (10, 10)).save(tmp_path / f"{name}.jpg")
        mask = Image.fromarray(values).convert("P")
        mask.putpalette(palette)
        mask.save(tmp_path / f"{name}.png")
    for record in asked(tmp_path, Format.folder):
        (region,) = record.regions
        assert record.area == Region.parse(region).mask(10, 10).sum() == 9
        assert ("value" in region) == (record.id == "white"), "what others have is as it was"


def test_masks_of_openai_lines_lie_where_their_images_do(tmp_path: Path) -> None:
    content = [{"type": "image_url", "image_url": {"url": "a.png"}}]
    regions = [{"mask": "m.png"}, {"mask": PNG}, BOX]
    line = {"custom_id": "a", "body": {"messages": [{"role": "user", "content": content}], "regions": regions}}
    (record,) = open_source(write_lines(tmp_path / "in.jsonl", [line])).records()
    assert record.regions == ({"mask": str(tmp_path / "m.png")}, {"mask": PNG}, BOX)


def test_no_tokens_at_all_are_refused_under_either_name(mini: Path, tmp_path: Path) -> None:
    def line(name: str, **options: int) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": "a.png"}}]
        body = {"messages": [{"role": "user", "content": content}], "regions": [BOX], **options}
        return {"custom_id": name, "body": body}

    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    lines = [line("new", max_completion_tokens=0), line("old", max_tokens=0)]
    lines += [line("both", max_completion_tokens=0, max_tokens=9), line("good", max_completion_tokens=7, max_tokens=9)]
    source = write_lines(tmp_path / "in.jsonl", list(lines))
    assert [record.options["max_tokens"] for record in open_source(source).records()] == [0, 0, 0, 7]
    run_echo(source, tmp_path / "out.jsonl", mini)
    found = {row["id"]: row.get("error", "") for row in rows(tmp_path / "out.jsonl")}
    assert found.pop("good") == ""
    assert set(found) == {"new", "old", "both"}
    assert all("max_tokens: expected at least 1" in error for error in found.values())


def test_fields_that_are_nearly_a_category(tmp_path: Path) -> None:
    good = {"image": "a.png", "regions": [BOX]}
    known = [{"category": "cat"}, {"type": "cat"}, {"category_id": 5}, {"supercategory": "x"}, {"types": "x"}]
    known += [{"category": "cat", "categorie": "chat"}]
    wrong = [{"catgory": "cat"}, {"Category": "cat"}, {"categroy": "cat", "type": "cat"}]
    source = open_source(write_lines(tmp_path / "in.jsonl", [good | more for more in known + wrong]))
    errors = [record.error for record in source.records()]
    assert errors[: len(known)] == [None] * len(known)
    for error, line in zip(errors[len(known) :], wrong, strict=True):
        assert f"unknown field {next(iter(line))!r}, did you mean 'category'?" in str(error)


def test_urls_as_images_are_named_as_such(tmp_path: Path) -> None:
    url = "https://example.org/a.jpg"
    lines = write_lines(tmp_path / "in.jsonl", [{"id": 5, "image": url, "regions": [BOX]}])
    box = {"image_id": 1, "bbox": [1, 1, 5, 5]}
    coco, sa1b = tmp_path / "c.json", tmp_path / "s.json"
    coco.write_text(json.dumps({"images": [{"id": 1, "file_name": url}], "annotations": [box]}))
    sa1b.write_text(json.dumps({"image": {"file_name": url}, "annotations": [box]}))
    for path in (lines, coco, sa1b):
        (record,) = open_source(path).records()
        assert "expected a path or a data URL, got 'https://example.org/a.jpg'; nothing is fetched" in str(record.error)


def test_names_and_numbers_that_no_disk_and_no_float_takes_cost_one_row(tmp_path: Path) -> None:
    box = {"image_id": 1, "bbox": [1, 1, 5, 5]}
    coco = {"images": [{"id": 1, "file_name": "a" * 5000}], "annotations": [box]}
    (tmp_path / "c.json").write_text(json.dumps(coco))
    (record,) = open_source(tmp_path / "c.json").records()
    assert str(record.image).endswith("a" * 5000)
    area = {**box, "id": 1, "area": int("9" * 400)}
    (tmp_path / "s.json").write_text(json.dumps({"image": {"file_name": "a.png"}, "annotations": [area, box]}))
    assert [record.area for record in open_source(tmp_path / "s.json").records()] == [None, None]


def test_cells_of_parquet_of_a_kind_that_no_field_takes(tmp_path: Path) -> None:
    write = parquet_writer()
    deep = "[" * 100_000 + "]" * 100_000
    path = write(tmp_path / "a.parquet", {"image": ["a.png"] * 3, "regions": ["5", deep, json.dumps([BOX])]})
    texts = list(open_source(path).records())
    assert ["regions" in str(record.error) for record in texts] == [True, True, False]
    path = write(tmp_path / "b.parquet", {"id": [b"a", b"b"], "image": ["a.png"] * 2, "regions": [5, 6]})
    assert [(record.key, record.error is None) for record in asked(path)] == [("b-row-0", False), ("b-row-1", False)]
    path = write(tmp_path / "c.parquet", {"id": [b"a"], "image": ["a.png"], "regions": ["{"]})
    assert [record.id for record in open_source(path).records()] == [None]


def test_whole_numbers_of_parquet_that_are_written_as_fractions(tmp_path: Path) -> None:
    """As pandas has a column with gaps."""
    columns: dict[str, list[Any]] = {
        "id": [7.0, None, float("nan"), 8.5, 2.0**53],
        "image": ["a.png"] * 5,
        "regions": [json.dumps([BOX])] * 5,
        "max_tokens": [3.0, None, float("nan"), 3.0, 3.0],
        "seed": [None, 4.0, 5.0, 5.0, 5.0],
        "prompt_index": [None, 2.0, None, None, None],
        "temperature": [1.0, None, 0.5, 1.0, 1.0],
    }
    *good, fraction, inexact = open_source(parquet_writer()(tmp_path / "a.parquet", columns)).records()
    assert [(record.key, record.error) for record in good] == [(7, None), ("a-row-1", None), ("a-row-2", None)]
    options = [dict(record.options) for record in good]
    assert options == [
        {"max_tokens": 3, "temperature": 1.0},
        {"seed": 4, "prompt_index": 2},
        {"seed": 5, "temperature": 0.5},
    ]
    assert {type(value) for one in options for name, value in one.items() if name != "temperature"} == {int}
    assert [str(record.error).partition(".")[0] for record in (fraction, inexact)] == ["id"] * 2


def test_a_broken_parquet_file_costs_one_row(tmp_path: Path) -> None:
    write = parquet_writer()
    columns = {"image": [f"{number}-{'x' * 200}.png" for number in range(6)], "regions": [json.dumps([BOX])] * 6}
    content = write(tmp_path / "a.parquet", columns).read_bytes()
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "c.parquet").write_bytes(content[:4] + b"\xff" * 40 + content[44:])
    source = open_source(tmp_path)
    records = list(source.records())
    assert [record.error for record in records[:6]] == [None] * 6
    errors = {record.key: record.error for record in records if record.error}
    assert set(errors) == {"b.parquet", "c.parquet"}
    assert "not Parquet, or broken" in str(errors["b.parquet"])
    with pytest.raises(RequestError, match="not Parquet"):
        open_source(tmp_path / "b.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"expected \*\.parquet files in the folder, got none"):
        open_source(tmp_path / "empty", Format.parquet)


def test_areas_that_are_no_numbers(tmp_path: Path) -> None:
    nan = float("nan")
    for option in ("min_area", "max_area"):
        with pytest.raises(RequestError, match=f"--{option.replace('_', '-')}: expected a number of pixels, got nan"):
            Filters(**{option: nan})
    for region in (
        {"xywh": [0, 0, nan, 5]},
        {"box": [nan, 0, float("inf"), 5]},
        {"polygon": [[0, 0], [nan, 1], [2, 2]]},
    ):
        with pytest.raises(RequestError, match="area: cannot be measured"):
            region_area(region)
    line = {"image": "a.png", "regions": [{"xywh": [0, 0, nan, 5]}]}
    (record,) = asked(write_lines(tmp_path / "in.jsonl", [line]), min_area=5)
    assert "area: cannot be measured" in str(record.error)
    stated = {"segmentation": RLE, "area": nan}
    (tmp_path / "s.json").write_text(json.dumps({"image": {"file_name": "a.png"}, "annotations": [stated]}))
    assert [one.area for one in asked(tmp_path / "s.json", min_area=5)] == [20.0]


def test_files_beside_an_output_of_an_input_that_is_gone(tmp_path: Path) -> None:
    """The target is there from an earlier run."""
    target = tmp_path / "out.json"
    target.touch()
    with pytest.raises(RequestError, match=r"gone\.json: no such file or folder"):
        check_coco(tmp_path / "gone.json", None, target)
    with pytest.raises(RequestError, match=r"gone\.json: no such file or folder"):
        check_coco(tmp_path / "gone.json", Format.coco, target)
    parquet_writer()
    check_parquet(tmp_path / "gone.json", target)  # the input is refused where it is opened
