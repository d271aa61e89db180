"""The peers of the benchmarks give what the authors' code gave, and what garserve gives: ratios compare equals."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import garserve
from garserve.checkpoint import Checkpoint
from garserve.conformance.case import SCALES, Case, relative_error
from garserve.inputs.images import load_image
from garserve.inputs.processor import draw_masks
from tests.conftest import ROOT, SHARED

CASES = sorted(path.stem for path in (SHARED / "golden").glob("s*.json"))


@pytest.fixture(scope="module")
def peers() -> Iterator[Any]:
    """The folder of the peers on the path, as a script of benchmarks/ has it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from peers import batched, upstream, upstream_inputs

        yield type("Peers", (), {"Question": upstream_inputs.Question, **vars(upstream), **vars(batched)})
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("name", CASES or [pytest.param("", id="none here")])
def test_upstream_equals_the_authors(golden: Path, peers: Any, name: str) -> None:
    case = Case.read(golden / f"{name}.json")
    checkpoint, arrays = Checkpoint.open(golden / case.data["checkpoint"]), case.arrays
    model = peers.UpstreamGAR(checkpoint, max_num_tiles=case.data["max_num_tiles"])

    question, boxes = _question(case, peers)
    inputs = model.inputs(question, boxes=boxes)
    assert torch.equal(inputs.ids, arrays["input_ids"].long())
    pixels = (inputs.pixels * 127.5 + 127.5).round().to(torch.uint8)
    assert torch.equal(pixels[..., 5::14, 5::14], arrays["pixel_u8_sample"])

    features = model.features(inputs.pixels, inputs.numbers)
    order = sorted(range(len(boxes)), key=lambda i: model.config.crop_token_ids[inputs.names[i]])
    for scale in SCALES:
        model.config = checkpoint.config.with_box_scale(scale)
        replayed = torch.stack([model.replay(features, inputs.grid, boxes[i]) for i in order])
        assert relative_error(replayed, arrays[f"replay_{scale}"]) < 1e-4
        embeddings, tokens = model.fill(inputs, features), arrays[f"tokens_{scale}"].tolist()
        mean = arrays.get("inputs_embeds_mean" if scale == "released" else "inputs_embeds_mean_geometric")
        assert mean is not None
        assert relative_error(embeddings.mean(dim=0), mean) < 1e-4
        assert model.generate([embeddings], len(tokens)) == [tokens]


def _question(case: Case, peers: Any) -> tuple[Any, list[tuple[float, ...]]]:
    """The case in the order of its text, with the boxes that its file says."""
    image = load_image(case.folder / case.data["image"]["file"])
    request = case.request()
    masks = draw_masks(request.parsed_regions(), *image.shape[:2])
    regions = case.data["regions"]
    order = request.listed() if case.data["mode"] == "multi" else [0]
    text = case.data["question"] if case.data["mode"] == "multi" else None
    names = [regions[i]["prompt_index"] for i in order]
    question = peers.Question(image, [masks[i] for i in order], names, text)
    return question, [tuple(regions[i]["bbox"]) for i in order]


def test_peers_say_what_garserve_says(peers: Any) -> None:
    checkpoint = Checkpoint.open("tiny")
    image = load_image(ROOT / "garserve" / "data" / "coffee.jpg")
    boxes = [[196, 228, 262, 310], [30, 40, 200, 210], [300, 10, 420, 120]]
    masks = draw_masks([garserve.Region.from_box(box) for box in boxes], *image.shape[:2])
    relation = "Where is <Prompt0> relative to <Prompt1>?"
    with garserve.load(backend="reference") as engine:
        said = [answer.token_ids for answer in engine.describe(image, boxes, max_tokens=40)]
        related = engine.ask(image, boxes[:2], relation, max_tokens=40).token_ids
    one, many = peers.UpstreamGAR(checkpoint), peers.BatchedGAR(checkpoint)
    questions = [peers.Question.single(image, mask) for mask in masks]
    stop = one.stop_id
    assert [one.answer(question, 40) for question in questions] == [[*tokens, stop] for tokens in said]
    assert many.answers(questions, 40, 2) == [[*tokens, stop] for tokens in said]
    assert one.answer(peers.Question(image, masks[:2], [0, 1], relation), 40) == [*related, stop]


def test_a_batch_computes_equal_tiles_once(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open("tiny")
    image = load_image(ROOT / "garserve" / "data" / "coffee.jpg")
    boxes = [[196, 228, 262, 310], [30, 40, 200, 210], [300, 10, 420, 120]]
    masks = draw_masks([garserve.Region.from_box(box) for box in boxes], *image.shape[:2])
    again = [mask.copy() for mask in masks]  # as a request of its own draws them
    relation = "Where is <Prompt0> relative to <Prompt1>?"
    one = peers.UpstreamGAR(checkpoint)
    many = peers.BatchedGAR.sharing(one)
    questions = [
        peers.Question(image, masks[:2], [0, 1], relation),
        peers.Question(image, masks[1:], [0, 1], relation),
        peers.Question(image, again[:2], [0, 1], "What colour is <Prompt1>?"),
        peers.Question(image, again[:2], [0, 1], relation, [1]),
        peers.Question(image.copy(), masks[:2], [0, 1], relation),  # another image: its pixels are not compared
    ]
    wanted = [one.embed(one.inputs(question)) for question in questions]
    passes: list[int] = []
    features = many.features
    monkeypatch.setattr(many, "features", lambda *tiles: passes.append(len(tiles[0])) or features(*tiles), raising=True)
    found = many.embed_all(questions)
    assert sum(passes) == 3 * len(one.inputs(questions[0]).pixels)
    for own, other in zip(found, wanted, strict=True):
        assert own.shape == other.shape
        assert relative_error(own, other) < 1e-5


def test_peers_in_a_process_of_their_own_say_the_same(peers: Any) -> None:
    from peers.answers import Peers, PeersApart

    image = load_image(ROOT / "garserve" / "data" / "coffee.jpg")
    boxes = [garserve.Region.from_box(box) for box in ([196, 228, 262, 310], [30, 40, 200, 210])]
    requests = [garserve.RegionRequest(image, [box], max_tokens=20) for box in boxes]
    requests += [garserve.RegionRequest(image, boxes, "Where is <Prompt1>?", focus=[1], max_tokens=20)]
    folder = Checkpoint.open("tiny").folder
    here, apart = Peers(folder), PeersApart(folder)
    with garserve.load(backend="reference") as engine:
        said = [answer.token_ids for answer in engine.describe_many(requests)]
    assert here.upstream(requests) == apart.upstream(requests) == said
    assert here.batched(requests[:2], 2) == apart.batched(requests[:2], 2) == said[:2]


def test_a_mask_in_the_first_place_keeps_its_pixels(peers: Any) -> None:
    """Where masks overlap the first prompt keeps the pixel; the model sees only their union."""
    inputs = peers.UpstreamGAR(Checkpoint.open("tiny")).inputs
    image = np.zeros((20, 20, 3), dtype=np.uint8)
    left, whole = np.zeros((20, 20), dtype=bool), np.ones((20, 20), dtype=bool)
    left[:, :10] = True
    numbers = inputs._numbers(peers.Question(image, [left, whole], [2, 0], "?"))
    assert numbers[0].tolist() == [2] * 10 + [0] * 10
