"""Which picture a region belongs to: one of another size, another sample or another id is no place to draw it."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from garserve.batch import source_folder
from garserve.batch.bundles import Bundle
from garserve.batch.filters import Shard
from garserve.batch.record import Record, request_digest
from garserve.batch.source import Format
from garserve.batch.sources import detect, open_source
from garserve.batch.wire import bundle_messages, read_bundle
from garserve.inputs import images
from tests.batch_data import rows, run_echo
from tests.test_batch_reading import BOX, asked, parquet_writer, write_tar

W, H = 60, 40
ORIENTATION = 0x0112
FRAMES = {  # what is stated of a picture of 60x40, or of one that is so after it is turned by its EXIF data
    "right": {"width": W, "height": H},
    "larger": {"width": 600, "height": 400},
    "turned": {"width": H, "height": W},
    "zero": {"width": 0, "height": H},
    "text": {"width": "600", "height": "400"},
    "half": {"width": W},
    "true": {"width": True, "height": True},
    "fraction": {"width": 60.5, "height": H},
    "float": {"width": 60.0, "height": 40.0},
    "none": {},
}
WRONG = {"larger": "600x400", "turned": "40x60"}


def save(path: Path, *, turned: bool = False) -> None:
    """Write a picture that is upright at 60x40."""
    noise = np.random.default_rng(3).integers(0, 255, (W, H, 3) if turned else (H, W, 3)).astype(np.uint8)
    exif = Image.Exif()
    if turned:
        exif[ORIENTATION] = 6
    Image.fromarray(noise).save(path, exif=exif)


def boxes(image: int) -> list[dict[str, Any]]:
    """Return two annotations that lie far apart."""
    return [{"id": f"{image}/{i}", "image_id": image, "bbox": [i * 40, 5, 15, 15]} for i in range(2)]


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("workers", [0, 1])
def test_annotations_of_pictures_of_another_size_are_errors(
    mini: Path, tmp_path: Path, group: int, workers: int
) -> None:
    pictures, annotations = [], []
    for number, (name, stated) in enumerate(FRAMES.items()):
        save(tmp_path / f"{name}.jpg", turned=name == "turned")
        pictures.append({"id": number, "file_name": f"{name}.jpg", **stated})
        annotations += boxes(number)
    (tmp_path / "c.json").write_text(json.dumps({"images": pictures, "annotations": annotations}))
    run_echo(tmp_path / "c.json", tmp_path / "out.jsonl", mini, group=group, workers=workers)
    found = {row["id"]: row.get("error") for row in rows(tmp_path / "out.jsonl")}
    assert len(found) == 2 * len(FRAMES)
    for number, name in enumerate(FRAMES):
        path = tmp_path / f"{name}.jpg"
        said = f"image {path}: the file says {WRONG[name]}, the upright image is 60x40" if name in WRONG else None
        assert [found[f"{number}/{i}"] for i in range(2)] == [said] * 2, name


def test_sa1b_of_pictures_of_another_size_is_an_error(mini: Path, tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    data = {"image": {"file_name": "a.jpg", **FRAMES["larger"]}, "annotations": boxes(0)}
    (tmp_path / "a.json").write_text(json.dumps(data))
    content = (tmp_path / "a.jpg").read_bytes()
    write_tar(tmp_path / "a.tar", {"a.jpg": content, "a.json": json.dumps(data).encode()})
    for name in ("a.json", "a.tar"):
        run_echo(tmp_path / name, tmp_path / f"{name}.out", mini)
        for row in rows(tmp_path / f"{name}.out"):
            assert row["error"].endswith("a.jpg: the file says 600x400, the upright image is 60x40")


def test_a_stated_size_travels_and_changes_no_digest() -> None:
    record = Record("annotation 1", 1, "a.png", "a.png", ([1, 1, 9, 9],), size=(W, H))
    bundle = Bundle((record,), (True,))
    assert read_bundle(bundle_messages(bundle)) == bundle
    assert request_digest(record) == request_digest(Record("", 1, "a.png", "", ([1, 1, 9, 9],)))


def test_two_images_with_one_id(tmp_path: Path) -> None:
    names = {1: "a.png", 2: "b.png", 3: "c.png"}
    pictures = [{"id": number, "file_name": name} for number, name in names.items()]
    pictures += [{"id": 1, "file_name": "z.png"}, {"id": 2, "file_name": "b.png"}]  # 2 is only told twice
    annotations = [one for number in names for one in boxes(number)]
    (tmp_path / "c.json").write_text(json.dumps({"images": pictures, "annotations": annotations}))
    found = {record.id: record.error for record in open_source(tmp_path / "c.json").records()}
    assert found == {
        one["id"]: "image_id: two images have the id 1" if one["image_id"] == 1 else None for one in annotations
    }


def test_ids_that_are_whole_numbers_written_as_fractions(tmp_path: Path) -> None:
    """As pandas writes a column that had a gap."""
    data = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2.0, "file_name": "b.png"}],
        "annotations": [
            {"id": 7.0, "image_id": 1.0, "category_id": 3.0, "bbox": [1, 1, 5, 5]},
            {"id": 8, "image_id": 2, "category_id": 4, "bbox": [1, 1, 5, 5]},
            {"id": 9.5, "image_id": 2, "bbox": [1, 1, 5, 5]},
        ],
        "categories": [{"id": 3, "name": "cup"}, {"id": 4.0, "name": "spoon"}],
    }
    (tmp_path / "c.json").write_text(json.dumps(data))
    records = list(open_source(tmp_path / "c.json").records())
    assert [record.error for record in records] == [None] * 3
    assert [(record.key, record.category) for record in records] == [(7, "cup"), (8, "spoon"), ("annotation-3", None)]
    assert [Path(record.image_name).name for record in records] == ["a.png", "b.png", "b.png"]


def test_a_sample_with_two_pictures_is_an_error(tmp_path: Path) -> None:
    request = json.dumps({"regions": [BOX]}).encode()
    files = {"0.jpg": b"photo", "0.png": b"mask?", "0.json": request, "1.jpg": b"photo", "1.json": request}
    bad, good = open_source(write_tar(tmp_path / "a.tar", files)).records()
    assert (bad.key, bad.error) == ("a/0", "two pictures: 0.jpg and 0.png; a mask is NAME.mask.png")
    assert (good.key, good.error) == ("a/1", None)


@pytest.mark.parametrize("order", ["json mask.png jpg", "mask.png json jpg", "jpg mask.png json"])
def test_a_mask_counts_wherever_it_stands_in_a_sample(tmp_path: Path, order: str) -> None:
    contents = {"jpg": b"photo", "mask.png": b"mask", "json": b'{"id": 5, "question": "What is <Prompt0>?"}'}
    path = write_tar(tmp_path / "a.tar", {f"0.{suffix}": contents[suffix] for suffix in order.split()})
    (record,) = open_source(path).records()
    assert (record.id, record.error) == (5, None)
    assert record.regions == ({"mask": "data:image/png;base64,bWFzaw=="},)
    contents["json"] = json.dumps({"regions": [BOX]}).encode()
    path = write_tar(tmp_path / "b.tar", {f"0.{suffix}": contents[suffix] for suffix in order.split()})
    assert [one.regions for one in open_source(path).records()] == [(BOX,)], "regions of its own come first"


def test_samples_whose_files_lie_apart_say_so(tmp_path: Path) -> None:
    """As `tar -cf` has them, in the disk's order."""
    apart = "files of a sample have to follow one another (tar --sort=name)"
    files = {f"x/{number}.{kind}": b"{}" for kind in ("jpg", "json", "MASK.png") for number in range(2)}
    path = write_tar(tmp_path / "a.tar", files | {"2.jpg": b"photo", "2.json": b"{}"})
    found = {str(record.key): str(record.error) for record in asked(path)}
    together = found.pop("a/2")
    assert "regions: Field required" in together
    assert apart not in together
    for number in range(2):
        name = f"x/{number}"
        assert found.pop(f"a/{name}.jpg") == f"expected NAME.json or NAME.mask.png among ['{name}.jpg']; {apart}"
        assert found.pop(f"a/{name}") == f"expected an image among ['{name}.json']; {apart}"
        assert found.pop(f"a/{name}.mask.png") == f"expected an image among ['{name}.MASK.png']; {apart}"
    assert found == {}


def test_shards_do_not_depend_on_where_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = parquet_writer()
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    files = {f"{number}.{kind}": b"{}" for number in range(30) for kind in ("jpg", "json")}
    files = {name: b'{"regions": [[1, 1, 9, 9]]}' if name.endswith("json") else b"x" for name, _ in files.items()}
    write_tar(tmp_path / "data" / "a.tar", files)
    columns: dict[str, list[Any]] = {"image": [b"photo"] * 4, "regions": [json.dumps([BOX])] * 4}
    write(tmp_path / "data" / "b.parquet", columns)
    for name in ("a.tar", "b.parquet"):
        found = []
        for place, path in (("elsewhere", f"../data/{name}"), ("data", name), (".", f"data/../data/{name}")):
            monkeypatch.chdir(tmp_path / place)
            records = list(open_source(Path(path)).records())
            folders = [Path(os.path.abspath(Path(path).parent))]
            found.append([(one.image_name, Shard(0, 3).holds(one, folders)) for one in records])
        assert found[0] == found[1] == found[2]
        assert found[0][0][0].startswith(f"{tmp_path}/data/{name}::")


def test_pictures_of_every_format_that_is_read(tmp_path: Path) -> None:
    kinds = {"GIF": ".gif", "AVIF": ".avif", "PPM": ".ppm", "JPEG": ".jfif", "WEBP": ".webp", "BMP": ".bmp"}
    kinds |= {"PNG": ".png", "TIFF": ".tif"}
    assert set(kinds) == set(images.FORMATS)
    assert set(kinds.values()) <= source_folder.SUFFIXES
    registered = Image.registered_extensions()
    assert {registered[suffix] for suffix in source_folder.SUFFIXES} == set(images.FORMATS)
    Image.new("L", (9, 9), 255).save(tmp_path / "a.pgm")
    assert detect(tmp_path) is Format.folder
    Image.new("L", (9, 9), 255).save(tmp_path / "a.png")
    Image.new("L", (9, 9), 255).save(tmp_path / "b.GIF")
    good, bad = open_source(tmp_path).records()
    assert (good.place, good.error, good.regions) == ("a.pgm", None, ({"mask": str(tmp_path / "a.png")},))
    assert (bad.place, bad.error) == ("b.GIF", f"mask: no such file: {tmp_path / 'b.png'}")


def test_masks_without_a_picture_are_errors(tmp_path: Path) -> None:
    for name in ("images/a.jpg", "masks/a.png", "masks/b.png", "masks/._a.png", "masks/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (9, 9), 255).save(tmp_path / name, "PNG")
    good, bad = open_source(tmp_path).records()
    assert (good.key, good.error) == ("a", None)
    assert (bad.key, bad.error) == ("b", f"image: no picture of this name in {tmp_path / 'images'}")


@pytest.mark.parametrize("folders", [("", ""), ("images", "masks")])
def test_masks_named_in_capitals(tmp_path: Path, folders: tuple[str, str]) -> None:
    pictures, masks = (tmp_path / folder for folder in folders)
    for folder in (pictures, masks):
        folder.mkdir(exist_ok=True)
    for name in ("a.JPG", "b.jpg"):
        Image.new("L", (9, 9)).save(pictures / name, "JPEG")
    for name in ("a.PNG", "b.Png"):
        Image.new("L", (9, 9), 255).save(masks / name, "PNG")
    found = [(record.key, record.error, record.regions) for record in asked(tmp_path, Format.folder)]
    assert found == [("a", None, ({"mask": str(masks / "a.PNG")},)), ("b", None, ({"mask": str(masks / "b.Png")},))]


def test_a_mask_named_in_capitals_is_not_taken_where_there_is_another(tmp_path: Path) -> None:
    for name in ("images/a.jpg", "masks/a.PNG", "masks/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (9, 9), 255).save(tmp_path / name, "PNG")
    if len(os.listdir(tmp_path / "masks")) == 1:
        pytest.skip("the disk does not tell capitals apart")
    (record,) = open_source(tmp_path).records()
    assert record.regions == ({"mask": str(tmp_path / "masks" / "a.png")},)
