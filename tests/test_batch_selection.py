"""What a job asks of its input: shards, areas, numbers that no JSON has, and what records without options get."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from garserve.batch.filters import Filters, Shard
from garserve.batch.ledger import Ledger
from garserve.batch.prepare import Preparation
from garserve.batch.source import Format, Reading
from garserve.batch.sources import open_source
from garserve.errors import RequestError
from tests.batch_data import plan_of, rows, run_echo
from tests.conftest import write_lines

BOX = [1, 1, 9, 9]
COUNT = 24


def chosen(path: Path, mini: Path, part: int, **options: Any) -> list[Any]:
    """Return the ids of one of two shards, of records in the order of their ids."""
    plan = plan_of(path, path.with_suffix(".out"), mini, filters=Filters(shard=Shard(part, 2)), **options)
    bundles = plan.selection(plan.open_source()).bundles(Ledger())
    return sorted(record.key for bundle in bundles for record in bundle.records)


def write_coco(root: Path, names: list[str], folder: str = "val2017", **fields: str) -> Path:
    """Write pictures and COCO's file about them, one annotation each; `fields` name the images in other ways."""
    images: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(root / folder / name)
        stated = {key: value.format(name) for key, value in fields.items()} or {"file_name": name}
        images.append({"id": number, **stated})
    boxes = [{"id": number, "image_id": number, "bbox": [1, 1, 5, 5]} for number in range(len(names))]
    (root / "annotations").mkdir()
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": []}))
    return path


@pytest.mark.parametrize("form", ["jsonl", "coco"])
def test_shards_of_images_above_a_file_named_without_its_folder(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    found = []
    for top in ("a", "b/c"):
        names = [f"{number}.png" for number in range(COUNT)]
        path = write_coco(tmp_path / top, names)
        if form == "jsonl":
            lines = [{"id": i, "image": f"../val2017/{i}.png", "regions": [BOX]} for i in range(COUNT)]
            path = write_lines(path.with_suffix(".jsonl"), [*lines])
        found.append(chosen(path, mini, 1))
        for folder in (path.parent, path.parent.parent, tmp_path):
            monkeypatch.chdir(folder)
            found.append(chosen(path.relative_to(folder), mini, 1))
    assert 0 < len(found[0]) < COUNT
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"file_name": "./{}"},
        {"file_name": "val2017/{}"},
        {"coco_url": "http://images.cocodataset.org/val2017/{}"},
    ],
)
def test_an_image_that_a_machine_does_not_have_stays_in_its_shard(
    mini: Path, tmp_path: Path, fields: dict[str, str]
) -> None:
    names = [f"{number}.png" for number in range(COUNT)]
    paths = [write_coco(tmp_path / machine, names, **fields) for machine in "ab"]
    whole = [chosen(path, mini, part) for part, path in enumerate(paths)]
    assert sorted(whole[0] + whole[1]) == list(range(COUNT))
    for number, name in enumerate(names):
        (tmp_path / "ab"[number % 2] / "val2017" / name).unlink()
    assert [chosen(path, mini, part) for part, path in enumerate(paths)] == whole


def test_shards_are_the_same_wherever_images_lie(mini: Path, tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(COUNT)]
    found = [chosen(write_coco(tmp_path / top, names, top), mini, 0) for top in ("val2017", "images")]
    path = write_coco(tmp_path / "far", names, "away")
    found.append(chosen(path, mini, 0, reading=Reading(images=tmp_path / "far" / "away")))
    assert found[0] == found[1] == found[2]


def test_a_missing_image_is_one_error_row_of_one_shard(mini: Path, tmp_path: Path) -> None:
    path = write_coco(tmp_path, ["0.png", "1.png", "2.png", "3.png"])
    (tmp_path / "val2017" / "2.png").unlink()
    out = tmp_path / "out.jsonl"
    for part in range(2):
        run_echo(path, out, mini, filters=Filters(shard=Shard(part, 2)), format=Format.coco)
    found = {row["id"]: row for row in rows(out)}
    assert sorted(row["id"] for row in rows(out)) == [0, 1, 2, 3]
    assert [key for key, row in found.items() if "error" in row] == [2]
    assert found[1]["image"] == str(tmp_path / "val2017" / "1.png")


def test_parts_that_are_no_shards() -> None:
    long = "9" * 5000
    for text in ("²/3", "0/³", "१/२", f"{long}/3", f"0/{long}", "0/2\n", " 0/2", "+0/2", "0/0"):
        with pytest.raises(RequestError, match="--shard: expected i/n with i from 0 to n - 1, got "):
            Shard.parse(text)


@pytest.mark.parametrize("area", [{"min_area": 50}, {"max_area": 50}])
def test_what_has_no_regions_to_measure_is_not_dropped(mini: Path, tmp_path: Path, area: dict[str, Any]) -> None:
    lines = [
        {"id": "encoded", "image": "a.safetensors", "regions": []},
        {"id": "none", "image": "a.png", "regions": []},
    ]
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    out = tmp_path / "out.jsonl"
    run_echo(write_lines(tmp_path / "in.jsonl", [*lines]), out, mini, filters=Filters(**area))
    told = {row["id"]: row["error"] for row in rows(out)}
    assert told == {
        "encoded": "area: not known for an encoded image; filter by area needs RLE, polygon or box",
        "none": "regions: expected at least one region, got none",
    }


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (
            "9223372036854775808",
            "a whole number has more than 63 bits, near .*9223372036854775808.*; write such ids as",
        ),
        ("-9223372036854775809", "a whole number has more than 63 bits, near .*; write such ids as texts"),
        ("NaN", "NaN and Infinity are no JSON, near .*äöü.* NaN.*; write null instead"),
        ("-Infinity", "NaN and Infinity are no JSON, near .*-Infinity.*; write null instead"),
        ("nan", r"not JSON \(lexical error"),
        ('"NaN", oops', r"not JSON \(lexical error"),
    ],
)
def test_numbers_that_a_parser_of_json_does_not_take(tmp_path: Path, number: str, told: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(
        '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "note": "äöü", "id": '
        + number
        + "}]}"
    )
    with pytest.raises(RequestError, match=rf"input .*c\.json: {told}"):
        list(open_source(path, Format.coco).records())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"question": ""}, "--question: expected a text, got ''"),
        ({"question": " \n"}, "--question: expected a text, got "),
        ({"question": "What \ud800?"}, "--question: half a character"),
        ({"system": "Be \udc80"}, "--system: half a character"),
        ({"max_tokens": 2_000_000}, r"--max-tokens: expected at least 1 \(and at most 1000000\), got 2000000"),
        ({"max_tokens": 0}, "--max-tokens: expected at least 1"),
        ({"temperature": float("nan")}, "--temperature: expected 0 to 2, got nan"),
    ],
)
def test_options_that_no_request_could_have_are_refused_before_the_job(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        Preparation("GAR", **options)


def test_an_empty_system_prompt_is_one() -> None:
    assert Preparation("GAR", system="").system == ""
