"""What comes of an output: COCO's JSON with captions, Parquet, a page that a browser shows, contact sheets."""

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from garserve.batch.contact_sheet import write_contact_sheet
from garserve.batch.outputs import check_coco, write_coco, write_parquet
from garserve.batch.prepare import encoded
from garserve.batch.report import write_report
from garserve.demo import REGIONS
from garserve.engine import Engine
from garserve.errors import RequestError
from garserve.inputs.processor import draw_masks
from garserve.inputs.regions import Region
from tests.batch_data import rows, run_echo, write_requests
from tests.browser import CHROMIUM, NO_CHROMIUM, browsing
from tests.conftest import PHOTO, ROOT

EVALUATION = ROOT / "garserve" / "data" / "tiny_eval"
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
    assert write_report(write_rows(tmp_path / "out.jsonl", photo_rows()), page) == 4
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
    assert write_report(write_rows(tmp_path / "out.jsonl", many), page) == 10_000
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
    assert write_report(out, tmp_path / "r.html", limit=5) == 5
    assert "the first 5 of 12 rows, 3 of them errors" in (tmp_path / "r.html").read_text()
    with pytest.raises(RequestError, match="expected rows of a job, got none"):
        write_report(write_rows(tmp_path / "none.jsonl", []), tmp_path / "r.html")
    (tmp_path / "other").write_text('{"a": 1}\n')
    with pytest.raises(RequestError, match="line 1 is no row"):
        write_report(tmp_path / "other", tmp_path / "r.html")


def test_contact_sheet(tmp_path: Path) -> None:
    target = tmp_path / "sheet.png"
    assert write_contact_sheet(write_rows(tmp_path / "out.jsonl", photo_rows()), target, 3, seed=1) == 3
    with Image.open(target) as sheet:
        assert sheet.size == (3 * 312 + 12, 396 + 12)
        orange = (np.abs(np.asarray(sheet.convert("RGB")).astype(int) - (0xE6, 0x9F, 0x00)) < 3).all(axis=2)
    assert orange.sum() > 100  # outlines


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
