"""Sources: every format gives the same regions under the same names, and says what it cannot read."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from garserve.batch import bundles
from garserve.batch.bundles import gather
from garserve.batch.filters import Filters, Shard, region_area
from garserve.batch.prepare import encoded, image_content
from garserve.batch.record import Record
from garserve.batch.source import Format, Reading
from garserve.batch.sources import detect, each_region, open_source
from garserve.errors import RequestError
from garserve.inputs.images import load_image
from garserve.inputs.regions import Region
from tests.batch_data import rows, run_echo
from tests.conftest import write_lines

H, W = 40, 60


@pytest.fixture
def masks() -> list[np.ndarray]:
    drawn = [np.zeros((H, W), bool) for _ in range(3)]
    drawn[0][5:20, 5:30] = True
    drawn[1][22:30, 10:50] = True
    drawn[2][31:39, 40:58] = True
    return drawn


@pytest.fixture
def picture_path(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (H, W, 3)).astype(np.uint8)).save(path)
    return path


def annotations(masks: list[np.ndarray]) -> list[dict[str, Any]]:
    """Return the same three regions as a polygon, a compressed RLE, and a crowd's list of runs."""
    runs = np.flatnonzero(np.diff(np.concatenate([[0], masks[2].T.reshape(-1), [0]]).astype(int)))
    counts = np.diff(np.concatenate([[0], runs, [H * W]])).tolist()
    polygon = [5, 5, 30, 5, 30, 20, 5, 20]
    shapes: list[Any] = [[polygon], encoded(masks[1]), {"size": [H, W], "counts": counts}]
    return [
        {
            "id": 10 + i,
            "image_id": 1,
            "category_id": 1 + i % 2,
            "segmentation": shape,
            "area": float(mask.sum()),
            "iscrowd": int(i == 2),
        }
        for i, (shape, mask) in enumerate(zip(shapes, masks, strict=True))
    ]


def coco_json(masks: list[np.ndarray]) -> dict[str, Any]:
    return {
        "info": {},
        "images": [{"id": 1, "file_name": "a.png", "height": H, "width": W}],
        "annotations": annotations(masks),
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "spoon"}],
    }


def drawn(record: Record) -> list[np.ndarray]:
    assert record.error is None, record.error
    return [Region.parse(region).mask(H, W) for region in record.regions]


def check(records: list[Record], masks: list[np.ndarray], picture: Path) -> None:
    """Hold records of one region each against the masks and the picture they were made from."""
    assert len(records) == len(masks)
    for record, mask in zip(records, masks, strict=True):
        assert (drawn(record)[0] == mask).all()
        assert (load_image(image_content(record.image)) == load_image(picture)).all()


def test_coco_polygons_rle_and_crowds(tmp_path: Path, masks: list[np.ndarray], picture_path: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco_json(masks)))
    source = open_source(path)
    records = list(source.records())
    check(records, masks, picture_path)
    assert (detect(path), source.total) == (Format.coco, 3)
    assert [(record.id, record.category) for record in records] == [(10, "cup"), (11, "spoon"), (12, "cup")]


def test_coco_annotations_come_image_by_image_and_those_without_one_are_errors(tmp_path: Path) -> None:
    box = {"bbox": [1, 1, 5, 5]}
    data = {
        "annotations": [{"id": i, "image_id": i % 3, **box} for i in range(9)] + [{"id": 99, "image_id": 7, **box}],
        "images": [{"id": i, "coco_url": f"http://images.cocodataset.org/val2017/{i}.jpg"} for i in (2, 0, 1)],
    }
    data["annotations"].append({"id": 100, "image_id": 0})
    (tmp_path / "lvis.json").write_text(json.dumps(data))
    records = list(open_source(tmp_path / "lvis.json").records())
    assert [record.id for record in records] == [99, 2, 5, 8, 0, 3, 6, 100, 1, 4, 7]
    assert {record.id: record.error for record in records if record.error} == {
        99: "image_id: no image 7 in lvis.json",
        100: "annotation: expected a segmentation or a bbox, got none",
    }
    assert records[1].image_name == str(tmp_path / "val2017" / "2.jpg")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "2.jpg").touch()
    for reading, place in ((Reading(images=tmp_path / "flat"), "flat/2.jpg"), (Reading(), "val2017/2.jpg")):
        found = {record.id: record.image for record in open_source(tmp_path / "lvis.json", reading=reading).records()}
        assert found[2] == str(tmp_path / place)
        assert str(found[1]).endswith("val2017/1.jpg"), "what is nowhere is named whole"
    (tmp_path / "flat" / "val2017").mkdir()
    (tmp_path / "flat" / "val2017" / "2.jpg").touch()
    flat = open_source(tmp_path / "lvis.json", reading=Reading(images=tmp_path / "flat"))
    assert {str(tmp_path / "flat" / "val2017" / "2.jpg")} == {
        one.image for one in flat.records() if one.id in (2, 5, 8)
    }


def test_sa1b_file_and_folder(tmp_path: Path, masks: list[np.ndarray], picture_path: Path) -> None:
    made = [{"id": 500 + i, "segmentation": encoded(mask), "area": int(mask.sum())} for i, mask in enumerate(masks)]
    data = {"image": {"file_name": "a.png", "width": W, "height": H}, "annotations": made}
    (tmp_path / "sa_1.json").write_text(json.dumps(data))
    (tmp_path / "sa_2.json").write_text('{"image": 7}')
    check(list(open_source(tmp_path / "sa_1.json").records()), masks, picture_path)
    assert detect(tmp_path) is Format.sa1b
    whole = list(open_source(tmp_path).records())
    assert [record.id for record in whole] == [500, 501, 502, None]
    assert "not the JSON of an SA-1B image" in str(whole[3].error)


def test_gar_bench_is_asked_as_the_authors_ask(tmp_path: Path, masks: list[np.ndarray], picture_path: Path) -> None:
    item = {
        "image": "a.png",
        "mask_rles": [encoded(mask) for mask in masks],
        "question": "Which is red, <Prompt0> or <Prompt2>?",
        "choices": ["A. <Prompt0>", "B. <Prompt2>"],
        "answer": "A",
        "type": "color",
    }
    (tmp_path / "bench.json").write_text(json.dumps([item]))
    assert detect(tmp_path / "bench.json") is Format.gar_bench
    (record,) = open_source(tmp_path / "bench.json").records()
    assert [(a == b).all() for a, b in zip(drawn(record), masks, strict=True)] == [True] * 3
    assert record.category == "color"
    assert str(record.options["question"]).endswith(
        "\nA. <Prompt0>\nB. <Prompt2>\nAnswer with the correct option's letter directly."
    )
    check(list(each_region(iter([record]))), masks, picture_path)
    assert [one.id for one in each_region(iter([record]))] == ["0/0", "0/1", "0/2"]


def test_openai_batch_file(tmp_path: Path, masks: list[np.ndarray], picture_path: Path) -> None:
    def line(identity: str, url: str, body: dict[str, Any], text: str = "What is <Prompt0>?") -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
        body = {"model": "GAR-1B", "messages": messages, "max_tokens": 7, **body}
        return {"custom_id": identity, "method": "POST", "url": "/v1/chat/completions", "body": body}

    region = {"rle": encoded(masks[0])}
    lines = [
        line("a", "a.png", {"regions": [region]}),
        line("b", f"file://{picture_path}", {"mm_processor_kwargs": {"regions": [region]}}),
        line("c", "https://example.org/a.png", {"regions": [region]}),
        line("d", "a.png", {}),
        {"custom_id": "e", "body": {"messages": [{"role": "user", "content": 5}]}},
        line("f", "a.png", {}),
    ]
    lines[-1]["body"]["messages"][1]["content"][0]["regions"] = [region]  # as the server takes them
    path = write_lines(tmp_path / "batch.jsonl", list(lines))
    assert detect(path) is Format.openai
    records = list(open_source(path).records())
    check([*records[:2], records[5]], masks[:1] * 3, picture_path)
    assert records[0].options == {"system": "Be brief.", "question": "What is <Prompt0>?", "max_tokens": 7}
    assert [record.id for record in records] == ["a", "b", "c", "d", "e", "f"]
    for record, part in zip(records[2:5], ("nothing is fetched", "regions: missing", "content"), strict=True):
        assert part in str(record.error)


def test_folders_with_binary_and_indexed_masks(
    mini: Path, tmp_path: Path, masks: list[np.ndarray], picture_path: Path
) -> None:
    folder = tmp_path / "set"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for name in ("binary", "indexed", "bordered", "empty", "unmasked"):
        Image.open(picture_path).save(folder / "images" / f"{name}.jpg")
    Image.fromarray(masks[0].astype(np.uint8) * 255).save(folder / "masks" / "binary.png")
    values = sum(mask.astype(np.uint8) * (i + 1) for i, mask in enumerate(masks)).astype(np.uint8)  # type: ignore[union-attr]
    values[0, :] = 255
    indexed = Image.fromarray(values).convert("P")
    indexed.putdata(values.reshape(-1).tolist())
    indexed.save(folder / "masks" / "indexed.png")
    values[masks[1] | masks[2]] = 255
    indexed.putdata(values.reshape(-1).tolist())
    indexed.save(folder / "masks" / "bordered.png")  # one object and Pascal VOC's border
    Image.new("L", (W, H)).save(folder / "masks" / "empty.png")
    assert detect(folder) is Format.folder
    run_echo(folder, tmp_path / "out.jsonl", mini)
    found = {row["id"]: row for row in rows(tmp_path / "out.jsonl")}
    assert set(found) == {"binary", "indexed:1", "indexed:2", "indexed:3", "bordered", "empty", "unmasked"}
    assert "covers no pixel" in found["empty"]["error"]
    assert "no such file" in found["unmasked"]["error"]
    bordered = masks[0] & ~(masks[1] | masks[2])
    bordered[0, :] = False
    areas = {record.id: record.area for record in open_source(folder).records()}
    assert (areas["binary"], areas["bordered"]) == (masks[0].sum(), bordered.sum())
    names = ("binary", "indexed:1", "indexed:2", "indexed:3", "bordered")
    for name, mask in zip(names, (masks[0], *masks, bordered), strict=True):
        assert (coco.decode(found[name]["regions"][0]) == mask).all(), name


def test_webdataset_shards(tmp_path: Path, masks: list[np.ndarray], picture_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(masks[1].astype(np.uint8) * 255).save(buffer, "PNG")
    request = json.dumps({"regions": [{"rle": encoded(masks[0])}], "id": "named"}).encode()
    files = {
        "x/001.png": picture_path.read_bytes(),
        "x/001.json": request,
        "x/002.png": picture_path.read_bytes(),
        "x/002.mask.png": buffer.getvalue(),
        "x/003.json": request,
        "x/004.png": picture_path.read_bytes(),
        "x/004.json": b"{",
    }
    with tarfile.open(tmp_path / "shard-0.tar", "w") as shard:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    (tmp_path / "shard-1.tar").write_bytes(b"no tar" * 200)
    assert detect(tmp_path) is Format.webdataset
    records = list(open_source(tmp_path).records())
    check(records[:2], masks[:2], picture_path)
    assert [record.key for record in records[:4]] == ["named", "shard-0/x/002", "shard-0/x/003", "shard-0/x/004"]
    for record, part in zip(records[2:], ("expected an image", "not JSON", "not a plain tar file"), strict=True):
        assert part in str(record.error)


def test_parquet_with_paths_and_bytes(tmp_path: Path, masks: list[np.ndarray], picture_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install garserve[parquet])")
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    regions = [[{"rle": encoded(mask)}] for mask in masks]
    images = [{"bytes": picture_path.read_bytes(), "path": None}] * 2 + [{"bytes": None, "path": "a.png"}]
    path = tmp_path / "part.parquet"
    parquet.write_table(arrow.table({"id": [1, 2, 3], "image": images, "regions": regions}), path)
    assert detect(path) is Format.parquet
    check(list(open_source(path).records()), masks, picture_path)
    texts = arrow.table({"image": ["a.png", "a.png"], "regions": [json.dumps(regions[0]), "{"]})
    parquet.write_table(texts, path)
    good, bad = open_source(path).records()
    check([good], masks[:1], picture_path)
    assert "regions: not JSON" in str(bad.error)


def test_unknown_formats_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "text.txt").write_text("hello\n")
    (tmp_path / "object.json").write_text('{"a": 1}')
    (tmp_path / "nothing").mkdir()
    for name, part in {
        "empty.jsonl": "empty",
        "text.txt": "unknown format",
        "object.json": "unknown format",
        "nothing": "unknown format",
        "gone": "no such file or folder",
    }.items():
        with pytest.raises(RequestError, match=part):
            open_source(tmp_path / name)
    with pytest.raises(RequestError, match="expected a file for the format coco, got a folder"):
        open_source(tmp_path / "nothing", Format.coco)
    broken = tmp_path / "broken.json"
    broken.write_text('{"images": [{"id": 1}], "annotations": [{"id": 1,')
    with pytest.raises(RequestError, match="not JSON"):
        list(open_source(broken).records())


def test_filters(tmp_path: Path, masks: list[np.ndarray]) -> None:
    (tmp_path / "c.json").write_text(json.dumps(coco_json(masks)))

    def ids(**options: Any) -> list[Any]:
        return [record.id for record in Filters(**options).of(open_source(tmp_path / "c.json").records())]

    areas = [int(mask.sum()) for mask in masks]
    assert ids(categories=frozenset({"cup"})) == [10, 12]
    assert ids(min_area=areas[1], max_area=areas[1]) == [11]
    assert ids(ids=frozenset({"12", "10"})) == [10, 12]
    assert ids(limit=2) == [10, 11]
    records = [Record(f"line {i}", i, image_name=f"{i // 3}.png") for i in range(90)]
    parts = [[r.id for r in Filters(shard=Shard(part, 4)).of(iter(records))] for part in range(4)]
    assert sorted(i for part in parts for i in part) == list(range(90))  # type: ignore[type-var]
    assert all(len({i // 3 for i in part}) * 3 == len(part) for part in parts)  # type: ignore[operator]
    chosen = []
    for top in ("/a", "/b/c"):  # the same data elsewhere
        placed = (Record(f"line {i}", i, image_name=f"{top}/a/{i}.png") for i in range(40))
        chosen.append([r.id for r in Filters(shard=Shard(1, 3)).of(placed, [Path("/x"), Path(top)])])
    assert 0 < len(chosen[0]) < 40
    assert chosen[0] == chosen[1]
    for wrong in ("4/4", "1", "a/b", "-1/2"):
        with pytest.raises(RequestError, match="--shard"):
            Shard.parse(wrong)


def test_areas_without_an_image(masks: list[np.ndarray]) -> None:
    areas = [float(mask.sum()) for mask in masks]
    assert [region_area(region) for region in ({"rle": encoded(masks[1])}, encoded(masks[2]))] == areas[1:]
    assert region_area({"box": [5, 5, 30, 20]}) == region_area([5, 5, 30, 20]) == areas[0]
    assert region_area({"polygon": [[5, 5], [30, 5], [30, 20], [5, 20]]}) == areas[0]
    assert region_area({"polygon": [[5, 5, 30, 5, 30, 20, 5, 20]] * 2}) == 2 * areas[0]
    cut_off = {"size": [H, W], "counts": encoded(masks[1])["counts"][:-1] + "\x7f"}
    for unknown in ({"points": [[1, 1]]}, {"rle": 5}, {"box": ["a"]}, {"rle": cut_off}):
        with pytest.raises(RequestError, match="area"):
            region_area(unknown)


def test_records_of_an_image_come_together_and_groups_stay_whole() -> None:
    records = [Record(f"line {i}", i, image=f"{i % 3}.png", regions=({},)) for i in range(300)]
    gathered = list(gather(iter(records), group=5))
    assert sorted(record.id for bundle in gathered for record in bundle) == list(range(300))  # type: ignore[type-var]
    assert all(len({record.image for record in bundle}) == 1 for bundle in gathered)
    assert all(len(bundle) % 5 == 0 for bundle in gathered)
    assert [record.id for record in gathered[0][:3]] == [0, 3, 6]


def test_windows_are_bounded_by_what_records_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "_WINDOW_BYTES", 1000)
    url = "data:image/png;base64," + "A" * 400
    for one in (Record("line", image=url), Record("line", image=b"A" * 400), Record("line", regions=({"mask": url},))):
        windows = list(bundles._windows(replace(one, id=i) for i in range(9)))
        assert [len(window) for window in windows] == [3, 3, 3]


def test_coco_annotations_with_rings_of_nothing_and_odd_categories(
    tmp_path: Path, masks: list[np.ndarray], picture_path: Path
) -> None:
    content = coco_json(masks)
    first, second, third = content["annotations"][:3]
    ring = [5, 5, 30, 5, 30, 20, 5, 20]
    first |= {"segmentation": [ring, [], [1, 2, 3, 4]]}
    second |= {"segmentation": [[]], "bbox": [5, 5, 25, 15]}
    third |= {"category_id": [1, 2]}
    (tmp_path / "c.json").write_text(json.dumps(content))
    records = {record.id: record for record in open_source(tmp_path / "c.json").records()}
    assert records[first["id"]].regions == ({"polygon": [ring]},)
    assert records[second["id"]].regions == ({"xywh": [5, 5, 25, 15], "clip": True},)
    assert records[third["id"]].category == "[1, 2]"


def test_reading_says_where_images_are(tmp_path: Path, masks: list[np.ndarray], picture_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "c.json").write_text(json.dumps(coco_json(masks)))
    assert next(open_source(other / "c.json", reading=Reading(images=tmp_path)).records()).image == str(picture_path)
