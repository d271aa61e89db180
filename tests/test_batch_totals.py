"""What a job says of itself: how far it is, how much it asked about, and what the names in a row's text mean."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from garserve.answers import Answer
from garserve.batch.filters import Filters, Shard
from garserve.batch.outputs import write_parquet
from garserve.batch.parcel import Entry, Parcel
from garserve.batch.progress import status
from garserve.batch.record import Record
from garserve.batch.rows import answer_row
from garserve.batch.source import Reading
from garserve.batch.totals import Totals
from garserve.checkpoint import Checkpoint
from garserve.inputs.encoded import EncodedImage
from garserve.model.fingerprint import vision_fingerprint
from tests.batch_data import rows, run_echo, write_requests
from tests.conftest import write_lines

BOX, OTHER = [1, 1, 20, 20], [30, 30, 50, 50]


def test_rows_of_an_output_that_are_not_asked_for_are_not_done(mini: Path, tmp_path: Path) -> None:
    source, out = write_requests(tmp_path, 12), tmp_path / "out.jsonl"
    run_echo(source, out, mini)
    totals = run_echo(source, out, mini, filters=Filters(limit=4))
    assert (totals.before, totals.done, totals.total) == (12, 4, 4)
    assert status(totals).startswith("4 of 4 rows")
    lines = [json.loads(line) | {"id": f"other{number}"} for number, line in enumerate(source.read_text().splitlines())]
    other = write_lines(tmp_path / "other.jsonl", list(lines[:3]))
    totals = run_echo(other, out, mini)
    assert (totals.before, totals.rows, totals.done, totals.total) == (12, 3, 3, 3)


def test_what_is_done_where_errors_are_asked_again(mini: Path, tmp_path: Path) -> None:
    source, out = write_requests(tmp_path, 9, images=3), tmp_path / "out.jsonl"
    (tmp_path / "1.png").rename(tmp_path / "gone")
    run_echo(source, out, mini)
    (tmp_path / "gone").rename(tmp_path / "1.png")
    totals = run_echo(source, out, mini, retry_errors=True)
    assert (totals.before, totals.rows, totals.done, totals.total) == (6, 3, 9, 9)


def test_what_is_done_where_nobody_counts() -> None:
    assert Totals(total=10, before=1000).done == 10
    assert Totals(total=10, before=4, rows=2).done == 6
    assert Totals(before=1000, rows=2).done == 1002
    assert status(Totals(total=10, before=1000)).startswith("10 of 10 rows")


def test_the_size_of_a_shard_is_not_known_beforehand(mini: Path, tmp_path: Path) -> None:
    assert Filters(shard=Shard(0, 2)).expected(10) is None
    assert Filters(limit=4).expected(10) == 4
    source, out = write_requests(tmp_path, 12, images=12), tmp_path / "out.jsonl"
    both = [run_echo(source, out, mini, filters=Filters(shard=Shard(part, 2))) for part in range(2)]
    assert sum(totals.rows for totals in both) == 12
    assert [totals.total for totals in both] == [None, None]
    assert both[1].done == both[1].rows < 12


def encoded_file(path: Path, checkpoint: Path, regions: int) -> str:
    """Write embeddings of zeros that a checkpoint takes."""
    opened = Checkpoint.open(checkpoint)
    config, fingerprint = opened.config, vision_fingerprint(opened)
    tokens, width = config.tokens_per_tile, config.hidden_size
    whole, part = torch.zeros(2 * tokens, width), torch.zeros(regions, tokens, width)
    EncodedImage(whole, part, fingerprint, config.replay_box_scale).save(path)
    return path.name


def test_regions_are_those_that_were_asked_about(mini: Path, tmp_path: Path) -> None:
    """Of pixels and of encoded images alike, and seen from the rows alone, as they come from a cluster."""
    write_requests(tmp_path, 1)
    two = encoded_file(tmp_path / "two.safetensors", mini, 2)
    pixels = {"image": "0.png", "regions": [BOX, OTHER]}
    stored = {"image": two, "regions": []}
    both, first = {"question": "Are <Prompt0> and <Prompt1> alike?"}, {"question": "What is <Prompt0>?", "focus": [0]}
    lines = [one | asked for one in (pixels, stored) for asked in (both, first)]
    totals = run_echo(write_lines(tmp_path / "in.jsonl", list(lines)), tmp_path / "out.jsonl", mini)
    assert (totals.errors, totals.regions) == (0, 6)
    found = sorted(rows(tmp_path / "out.jsonl"), key=lambda row: row["id"])
    assert [(len(row["regions"]), row.get("asked")) for row in found] == [(2, None), (2, 1), (0, 2), (0, 1)]
    counted = Totals()
    for row in found:
        counted.add_row(row)
    assert counted.regions == totals.regions


def test_each_region_of_encoded_images(mini: Path, tmp_path: Path) -> None:
    """One region is described whatever the line asks; several cannot be by themselves."""
    files = [encoded_file(tmp_path / f"{count}.safetensors", mini, count) for count in (1, 2)]
    asked: list[dict[str, Any]] = [{}, {"question": "What is <Prompt0>?"}]
    lines = [{"image": file, "regions": [], **more} for file in files for more in asked]
    source, reading = write_lines(tmp_path / "in.jsonl", list(lines)), Reading(each_region=True)
    run_echo(source, tmp_path / "out.jsonl", mini, reading=reading)
    found = {row["id"]: row for row in rows(tmp_path / "out.jsonl")}
    assert set(found) == {"line-1", "line-2/0", "line-3", "line-4/0"}
    assert found["line-1"]["text"] == found["line-2/0"]["text"]
    assert "question" not in found["line-2/0"]
    for name in ("line-3", "line-4/0"):
        assert "image: was encoded with 2 regions, which are only asked about together" in found[name]["error"]


def grouped_row(text: str, own: str, group: list[str]) -> dict[str, Any]:
    empty = torch.empty(0, dtype=torch.uint8).numpy()
    entry = Entry(0, empty, empty, b"", [], [[0, 1], [1, 2]], [], 5, 0.0, None, "group of 3", group=group)  # type: ignore[arg-type]
    answer = Answer(text=text, token_ids=[1], finish_reason="stop", prompt_tokens=5, cached_tokens=0)
    return answer_row(Record("line 1", own), entry, Parcel(empty, regions={0: [{}]}), answer, 0.0)


@pytest.mark.parametrize(
    ("own", "text", "expected", "group"),
    [
        (
            "c",
            "<Prompt2> is left of <Prompt0>, not <Prompt1>.",
            "<Prompt0> is left of <Prompt2>, not <Prompt1>.",
            "cba",
        ),
        ("a", "<Prompt0> is left of <Prompt2>.", "<Prompt0> is left of <Prompt2>.", "abc"),
        ("b", "<Prompt1>, <Prompt10>", "<Prompt0>, <Prompt10>", "bac"),
    ],
)
def test_names_in_the_text_of_a_group(own: str, text: str, expected: str, group: str) -> None:
    row = grouped_row(text, own, ["a", "b", "c"])
    assert (row["text"], row["group"]) == (expected, list(group))


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_say_who_shared_their_prompt(mini: Path, tmp_path: Path, workers: int) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install garserve[parquet])")
    import pyarrow.parquet as parquet

    write_requests(tmp_path, 1)
    boxes: dict[Any, list[int]] = {"large": [0, 0, 40, 40], 5: [70, 0, 85, 15], "near": [41, 0, 60, 10]}
    lines = [{"id": name, "image": "0.png", "regions": [box]} for name, box in boxes.items()]
    source, out = write_lines(tmp_path / "in.jsonl", list(lines)), tmp_path / "out.jsonl"
    run_echo(source, out, mini, group=2, workers=workers)
    found = {row["id"]: row for row in rows(out)}
    assert {name: row.get("group") for name, row in found.items()} == {
        "large": ["large", 5],
        5: [5, "large"],
        "near": None,
    }
    write_parquet(out, tmp_path / "out.parquet")
    read = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert {row["id"]: json.loads(row["group"] or "null") for row in read} == {
        str(name): row.get("group") for name, row in found.items()
    }
