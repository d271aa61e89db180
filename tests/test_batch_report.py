"""What comes of an output: COCO's JSON with captions, Parquet, a page that a browser shows, contact sheets."""

import io
import json
import os
import re
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from garserve.batch.contact_sheet import write_contact_sheet
from garserve.batch.outputs import check_coco, write_coco, write_parquet
from garserve.batch.prepare import encoded
from garserve.batch.report import write_report
from garserve.batch.row_images import RowImages
from garserve.cli import app
from garserve.cli_report import report
from garserve.demo import REGIONS
from garserve.engine import Engine
from garserve.errors import RequestError
from garserve.inputs.processor import draw_masks
from garserve.inputs.regions import Region
from tests.batch_data import rows, run_echo, write_requests
from tests.browser import CHROMIUM, NO_CHROMIUM, browsing
from tests.conftest import PHOTO, ROOT

EVALUATION = ROOT / "garserve" / "data" / "tiny_eval"
runner = CliRunner()

OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
OPTIONS.append("--disable-background-networking")


def browse(page: Path, folder: Path, fragment: str) -> str:
    """Open a page in a headless browser and return its DOM after its scripts have run."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={folder}", "--virtual-time-budget=8000", "--dump-dom"]
    return subprocess.run(
        [*command, f"{page.as_uri()}#{fragment}"], check=True, capture_output=True, text=True, timeout=300
    ).stdout


def photo_rows() -> list[dict[str, Any]]:
    """Return rows about three regions of a photograph, an error, and text that would be markup."""
    with Image.open(PHOTO) as photo:
        width, height = photo.size
    rng = np.mgrid[0:height, 0:width]
    discs = [
        (rng[0] - y) ** 2 + (rng[1] - x) ** 2 < r * r for y, x, r in ((283, 366, 40), (150, 300, 60), (60, 80, 30))
    ]
    said = ("A small red saucer", "A white cup & <b>coffee</b></script>", "A brown table")
    answered = [
        {
            "id": f"r{i}",
            "text": text,
            "form": "single",
            "image": str(PHOTO),
            "regions": [encoded(disc)],
            "category": "c",
        }
        for i, (text, disc) in enumerate(zip(said, discs, strict=True))
    ]
    return [*answered, {"id": 7, "error": "gone.png: no such file", "image": "gone.png", "place": "line 4"}]


def write_rows(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_a_browser_shows_regions_and_filters(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert write_report(write_rows(tmp_path / "out.jsonl", photo_rows()), page) == (4, 1)
    everything = browse(page, tmp_path / "profile", "")
    assert 'data-shown="4"' in everything
    (pixels,) = re.findall(r'data-pixels="([\d ]+)"', everything)
    expected = [encoded_area * (480 / 600) ** 2 for encoded_area in (np.pi * r * r for r in (40, 60, 30))]
    assert [int(count) for count in pixels.split()] == pytest.approx(expected, rel=0.05)
    assert "A white cup &amp; &lt;b&gt;coffee&lt;/b&gt;&lt;/script&gt;" in everything
    assert "4 rows, 1 of them errors" in everything
    red = browse(page, tmp_path / "profile", "filter=red+saucer")
    assert 'data-shown="1"' in red
    assert "A small red saucer" in red.split("</form>")[1].split("</main>")[0]
    assert "brown table" not in red.split("</form>")[1].split("</main>")[0]
    errors = browse(page, tmp_path / "profile", "kind=errors")
    assert 'data-shown="1"' in errors
    assert '<span class="error">gone.png: no such file</span>' in errors


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_ten_thousand_rows_open_at_once(tmp_path: Path) -> None:
    with Image.open(PHOTO) as photo:
        photo.resize((120, 80)).save(tmp_path / "small.png")
    disc = encoded(np.hypot(*(np.mgrid[0:80, 0:120] - np.array([40, 60])[:, None, None])) < 20)
    row = {"image": str(tmp_path / "small.png"), "regions": [disc]}
    many = [{"id": i, "text": f"Answer {i}", **row} for i in range(10_000)]
    page = tmp_path / "report.html"
    assert write_report(write_rows(tmp_path / "out.jsonl", many), page) == (10_000, 0)
    assert page.stat().st_size < 10_000_000
    before = time.monotonic()
    shown = browse(page, tmp_path / "profile", "page=3")
    assert time.monotonic() - before < 200  # a few seconds, where the machine has nothing else to do
    assert 'data-shown="10000"' in shown
    assert '<span id="place">3 / 72</span>' in shown
    assert shown.count("<article") == 20
    assert "Answer 280" in shown.split("</form>")[1].split("</main>")[0]


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_a_page_of_what_tiny_says(tmp_path: Path, tiny_reference: Engine) -> None:
    """With GARSERVE_SCREENSHOTS=docs its picture is taken."""
    asked = map(json.loads, (EVALUATION / "questions.jsonl").read_text().splitlines())
    held_out = next(row for row in asked if row["image"].endswith("photographs_0012.jpg") and row["question"] is None)
    part = {"part": Region.parse(held_out["regions"][0])}
    captions = []
    for name, path, regions in (("coffee", PHOTO, REGIONS), ("held_out", EVALUATION / held_out["image"], part)):
        (tmp_path / f"{name}.jpg").write_bytes(path.read_bytes())
        with Image.open(path) as picture:
            masks = draw_masks(list(regions.values()), picture.height, picture.width)
        for (label, region), mask in zip(regions.items(), masks, strict=True):
            (answer,) = tiny_reference.describe(path, [region])
            row = {"id": f"{name}/{label}", "text": answer.text, "form": "single", "image": f"{name}.jpg"}
            captions.append({**row, "regions": [encoded(mask)]})
    error = {"id": 7, "error": "gone.png: no such file", "image": "gone.png", "place": "line 4"}
    page = tmp_path / "captions.html"
    write_report(write_rows(tmp_path / "captions.jsonl", [*captions, error]), page, folder=tmp_path)
    with browsing(tmp_path) as tab:
        tab.window(1100, 770)
        tab.open(f"{page.as_uri()}#filter=region")
        tab.wait("[...document.querySelectorAll('canvas')].filter(canvas => canvas.dataset.pixels).length === 2")
        shown = tab.run("document.querySelector('main').innerText")
        assert all(row["text"] in shown for row in captions)
        assert "gone.png" not in shown
        assert tab.complaints == []
        if folder := os.environ.get("GARSERVE_SCREENSHOTS"):
            tab.screenshot(Path(folder) / "report.png")


def test_a_report_of_a_part_says_so(tmp_path: Path) -> None:
    out = write_rows(tmp_path / "out.jsonl", photo_rows() * 3)
    assert write_report(out, tmp_path / "r.html", limit=5) == (5, 1)
    assert "the first 5 of 12 rows, 3 of them errors" in (tmp_path / "r.html").read_text()
    with pytest.raises(RequestError, match="expected rows of a job, got none"):
        write_report(write_rows(tmp_path / "none.jsonl", []), tmp_path / "r.html")
    (tmp_path / "other").write_text('{"a": 1}\n')
    with pytest.raises(RequestError, match="line 1 is no row"):
        write_report(tmp_path / "other", tmp_path / "r.html")


def test_contact_sheet(tmp_path: Path) -> None:
    target = tmp_path / "sheet.png"
    assert write_contact_sheet(write_rows(tmp_path / "out.jsonl", photo_rows()), target, 3, seed=1).rows == 3
    with Image.open(target) as sheet:
        assert sheet.size == (3 * 312 + 12, 396 + 12)
        orange = (np.abs(np.asarray(sheet.convert("RGB")).astype(int) - (0xE6, 0x9F, 0x00)) < 3).all(axis=2)
    assert orange.sum() > 100  # outlines


def test_line_breaks_on_a_contact_sheet_are_spaces(tmp_path: Path) -> None:
    def sheet(name: str, identity: str, text: str) -> np.ndarray:
        write_contact_sheet(write_rows(tmp_path / name, [{"id": identity, "text": text}]), tmp_path / "s.png", 1)
        with Image.open(tmp_path / "s.png") as picture:
            return np.asarray(picture.convert("RGB"))

    broken = sheet("a.jsonl", "a\nb", "First.\nSecond.\r\n\n- third")
    assert (broken == sheet("b.jsonl", "a b", "First. Second. - third")).all()


def test_pictures_that_are_not_found_are_counted(tmp_path: Path) -> None:
    """Each once; what came within a request has no file to be found."""
    found, *_, gone = photo_rows()
    inline = {"id": 8, "text": "inside", "image": "data URL"}
    out = write_rows(tmp_path / "out.jsonl", [found, gone, gone | {"id": 9}, inline])
    said = runner.invoke(app, ["report", str(out), "-o", str(tmp_path / "r.html")]).stdout.splitlines()
    assert said[1:] == ["1 pictures not found; --images FOLDER says where they are now"]
    (tmp_path / "empty").mkdir()
    arguments = ["report", str(out), "--images", str(tmp_path / "empty")]
    for more in (["-o", str(tmp_path / "r.html")], ["-o", str(tmp_path / "s.png"), "--sample", "4"]):
        done = runner.invoke(app, [*arguments, *more])
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith("4 rows: ")
        assert f"2 pictures not found in {tmp_path / 'empty'}" in done.stdout
    write_rows(out, [found, inline])
    assert "not found" not in runner.invoke(app, ["report", str(out), "-o", str(tmp_path / "r.html")]).stdout


def test_options_of_a_report_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    out = write_rows(tmp_path / "out.jsonl", photo_rows())
    arguments = ["report", str(out), "-o", str(tmp_path / "r")]
    for more, message in (
        (["--sample", "2", "--limit", "10000"], "--limit: expected it without --sample, .* got 10000"),
        (["--seed", "0"], "--seed: expected it with --sample, .* got 0"),
    ):
        done = runner.invoke(app, [*arguments, *more])
        assert isinstance(done.exception, RequestError), done.output
        assert re.search(message, str(done.exception))
    for folder in (tmp_path / "typo", out):
        assert runner.invoke(app, [*arguments, "--images", str(folder)]).exit_code == 2
    assert not (tmp_path / "r").exists()


def test_coco_with_captions(mini: Path, tmp_path: Path) -> None:
    write_requests(tmp_path, 1)
    annotations = [{"id": i, "image_id": 1, "bbox": [i, i, 20, 20], "extra": "kept"} for i in range(5)]
    annotations.append({"id": 9, "image_id": 2, "bbox": [1, 1, 2, 2]})
    data = {"info": {"year": 2026}, "images": [{"id": 1, "file_name": "0.png"}], "annotations": annotations}
    source, out, target = (tmp_path / name for name in ("c.json", "out.jsonl", "captions.json"))
    source.write_text(json.dumps(data))
    check_coco(source, None, target)
    run_echo(source, out, mini)
    assert write_coco(source, out, target) == 5
    made = json.loads(target.read_text())
    texts = {row["id"]: row["text"] for row in rows(out) if "text" in row}
    assert [one.pop("caption", None) for one in made["annotations"]] == [*(texts[i] for i in range(5)), None]
    assert made == data | {"licenses": [], "categories": []}
    with pytest.raises(RequestError, match="expected annotations in COCO's format as the input, got jsonl"):
        check_coco(tmp_path / "in.jsonl", None, target)


def test_captions_go_to_the_annotation_that_was_answered_of_those_with_one_id(tmp_path: Path) -> None:
    box = {"bbox": [1, 1, 20, 20]}
    annotations = [{"id": 7, "image_id": 2, **box}, {"id": 7, "image_id": 1, **box}, {"image_id": 1, **box}]
    images = [{"id": number, "file_name": f"{number}.png"} for number in (1, 2)]
    source, out, target = (tmp_path / name for name in ("c.json", "out.jsonl", "captions.json"))
    answered = [
        {"id": 7, "text": "the one of image 1", "place": "annotation 2"},  # images come in their order
        {"id": "annotation-3", "text": "without an id", "place": "annotation 3"},
        {"id": "annotation-1", "error": "id: 7 came up before in this input", "place": "annotation 1"},
    ]
    write_rows(out, answered)

    def captions(order: list[int]) -> list[str | None]:
        chosen = [annotations[i] for i in order]
        source.write_text(json.dumps({"images": images, "annotations": chosen}))
        count = write_coco(source, out, target)
        found = [one.get("caption") for one in json.loads(target.read_text())["annotations"]]
        assert count == sum(one is not None for one in found)
        return found

    assert captions([0, 1, 2]) == [None, "the one of image 1", "without an id"]
    assert captions([1]) == ["the one of image 1"]  # it stood elsewhere when it was answered


def picture_bytes(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def shown(images: RowImages, name: Path | str) -> int | None:
    """Return the value that a picture of one colour has everywhere."""
    pixels = images.read(str(name))
    return None if pixels is None else int(pixels[0, 0, 0])


def test_pictures_in_a_tar_are_found_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as shard:
        for number in range(20):
            content = picture_bytes(number)
            info = tarfile.TarInfo(f"x/{number}.png")
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    opened, real = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *one, **more: opened.append(one) or real(*one, **more))
    images = RowImages()
    assert [shown(images, f"{path}::x/{number}.png") for number in range(20)] == list(range(20))
    assert shown(images, f"{path}::x/gone.png") is None
    assert len(opened) == 1
    path.write_bytes(path.read_bytes()[:-12_000])  # cut off: what can be read is shown
    assert shown(RowImages(), f"{path}::x/0.png") == 0
    assert shown(RowImages(), f"{tmp_path / 'gone.tar'}::x/0.png") is None


def test_pictures_in_parquet_are_read_a_row_group_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install garserve[parquet])")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    images = [{"bytes": picture_bytes(number), "path": None} for number in range(20)]
    parquet.write_table(arrow.table({"image": images}), path, row_group_size=7)
    read, real = [], parquet.ParquetFile.read_row_group

    def counting(self: Any, group: int, **more: Any) -> Any:
        read.append(group)
        return real(self, group, **more)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counting)
    rows_of = RowImages()
    assert [shown(rows_of, f"{path}::{number}") for number in range(20)] == list(range(20))
    assert read == [0, 1, 2]
    for number in (20, -1, "x"):
        assert shown(rows_of, f"{path}::{number}") is None


def test_pictures_that_were_moved_are_found_by_as_much_of_their_path_as_there_is(tmp_path: Path) -> None:
    for number, name in enumerate(("train/1.png", "val/1.png", "2.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture_bytes(number))
    images = RowImages(tmp_path)
    names = ("/gone/train/1.png", "/gone/set/val/1.png", "val/1.png", "/gone/val/2.png", "/gone/3.png")
    assert [shown(images, name) for name in names] == [0, 1, 1, 2, None]


def write_containers(folder: Path) -> None:
    """Write pictures of the values 1 to 3: in a tar, in a tar below a folder with "::", and as a file there."""
    inner = folder / "a::b"
    inner.mkdir(parents=True)
    for path, member, value in ((folder / "UP.TAR", "x/1.png", 1), (inner / "c.tar", "x::y.png", 2)):
        with tarfile.open(path, "w") as shard:
            content = picture_bytes(value)
            info = tarfile.TarInfo(member)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    (inner / "3.png").write_bytes(picture_bytes(3))


@pytest.mark.parametrize("moved", [False, True])
def test_pictures_below_odd_names_are_found(tmp_path: Path, moved: bool) -> None:
    write_containers(tmp_path / "set")
    images = RowImages(tmp_path) if moved else RowImages()
    before = "/gone/set" if moved else tmp_path / "set"
    names = ("UP.TAR::x/1.png", "a::b/c.tar::x::y.png", "a::b/3.png", "UP.TAR::x/2.png", "a::b/4.png")
    assert [shown(images, f"{before}/{name}") for name in names] == [1, 2, 3, None, None]


def test_a_file_with_the_name_of_a_member_is_another_picture(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(picture_bytes(1))
    images = RowImages(tmp_path)
    assert shown(images, "/gone/a.tar::x/1.png") is None
    assert shown(images, "/gone/a::b/1.png") == 1


def test_rows_of_parquet_whose_name_ends_in_capitals(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install garserve[parquet])")
    import pyarrow.parquet as parquet

    (tmp_path / "a::b").mkdir()
    path = tmp_path / "a::b" / "A.PARQUET"
    parquet.write_table(arrow.table({"image": [picture_bytes(number) for number in range(3)]}), path)
    assert [shown(RowImages(), f"{path}::{number}") for number in range(4)] == [0, 1, 2, None]


def test_a_report_of_an_output_that_is_gone(tmp_path: Path) -> None:
    target = tmp_path / "old.html"
    target.touch()
    with pytest.raises(RequestError, match=r"gone\.jsonl: cannot be read"):
        report(tmp_path / "gone.jsonl", target)
    assert target.read_text() == ""


def test_parquet_of_an_output(mini: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (pip install garserve[parquet])")
    source = write_requests(tmp_path, 7)
    with source.open("a") as file:
        file.write("{")
    run_echo(source, tmp_path / "out.jsonl", mini)
    assert write_parquet(tmp_path / "out.jsonl", tmp_path / "out.parquet") == 8
    read = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    for ours, row in zip(read, rows(tmp_path / "out.jsonl"), strict=True):
        assert json.loads(ours["regions"]) == row.get("regions", [])
        assert {key: ours[key] for key in row if key != "regions"} == {k: v for k, v in row.items() if k != "regions"}
