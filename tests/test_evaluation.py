"""Judging answers, reading questions, and the accuracy of the tiny checkpoint on both backends."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from garserve.cli import app
from garserve.engine import Engine
from garserve.errors import InputError, RequestError
from garserve.evaluation.ablation import without
from garserve.evaluation.part import Part
from garserve.evaluation.questions import EvalQuestion, read_questions
from garserve.evaluation.run import evaluate, run_evaluations
from garserve.evaluation.score import Accuracy, judge
from garserve.evaluation.words import WORDS
from garserve.inputs.images import load_image
from garserve.inputs.request import RegionRequest
from tests.conftest import PHOTO
from tests.train_tiny import training_module


@pytest.fixture(scope="module")
def folder(reference: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about a photograph; what the mini checkpoint says is the true answer of all but every third."""
    made = tmp_path_factory.mktemp("questions")
    image = load_image(PHOTO)
    Image.fromarray(image).save(made / "photo.png")
    rows = []
    for number in range(12):
        x = 40 * number
        row = {"id": f"q{number}", "split": "left" if number < 6 else "right", "image": "photo.png"}
        row |= {"regions": [{"box": [x, 20, x + 60, 90]}, {"points": [[500 - x, 200]]}]}
        row |= {"question": f"What is <Prompt{number % 2}>?", "attribute": "colour", "form": "free"}
        said = reference.ask(image, row["regions"], row["question"], max_tokens=48).text
        rows.append(json.dumps(row | {"answer": said if number % 3 else "Something else."}))
    (made / "questions.jsonl").write_text("\n".join(rows))
    return made


def known(form: str, answer: str | None = None, **truth: str) -> EvalQuestion:
    return EvalQuestion(RegionRequest("a.jpg", []), "scenes", "colour", form, answer, truth)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("true", "answer", "right"),
    [
        ("<Prompt0> is red.", "<Prompt0> is red.", True),
        ("<Prompt0> is red.", " <prompt0> is red ", True),
        ("<Prompt0> is red.", "<Prompt1> is red.", False),
        ("<Prompt0> is red.", "<Prompt0> is not red.", False),
        ("<Prompt0> is red.", "", False),
        ("<Prompt1> is larger.", "<Prompt1> is smaller.", False),
        ("<Prompt1> is above <Prompt0>.", "<Prompt1> is above <Prompt2>.", False),
        ("Yes.", "Yes or no.", False),
        ("A", "A small, red region at the top of the image.", False),
        ("A", "A.", True),
    ],
)
def test_an_answer_is_the_true_one_or_not(true: str, answer: str, right: bool) -> None:
    assert judge(known("free", true), answer) == {"colour": right}


def test_a_description_is_judged_word_by_word() -> None:
    question = known("describe", colour="red", shape="round", position="top left", texture="plain", size="small")
    true = "A small, round, red region with a plain surface at the top left of the image."
    assert judge(question, true) == dict.fromkeys(question.truth, True)
    other = "A small, red region around a textured surface at the left of the image."
    assert judge(question, other) == {
        "colour": True,
        "size": True,
        "shape": False,
        "position": False,
        "texture": False,
    }
    assert judge(known("describe", colour="red"), "A red and blue region.") == {"colour": False}


def test_words_are_those_of_the_definitions() -> None:
    attributes = training_module("attributes")
    assert {name: set(words) for name, words in WORDS.items()} == {
        "colour": set(attributes.COLOURS),
        "size": set(attributes.SIZES),
        "position": set(attributes.POSITIONS),
        "shape": set(attributes.SHAPES),
        "texture": set(attributes.TEXTURES),
    }


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(9, 10, 0.596, 0.982), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0)]
)
def test_wilson_interval(right: int, count: int, low: float, high: float) -> None:
    assert Accuracy(right, count).interval == pytest.approx((low, high), abs=1e-3)


def test_no_answers_no_accuracy() -> None:
    assert str(Accuracy(0, 0)) == "-"
    assert Accuracy(0, 0).interval == (0.0, 1.0)


GOOD = {
    "id": "q",
    "split": "own",
    "image": "a.png",
    "regions": [{"box": [1, 1, 5, 5]}],
    "question": "What colour is <Prompt0>?",
    "attribute": "colour",
    "form": "free",
    "answer": "<Prompt0> is red.",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 5}, "id: Input should be a valid string, got 5"),
        ({"regions": []}, "regions: List should have at least 1 item"),
        ({"form": "song"}, "form: Input should be"),
        ({"answer": None}, "answer: expected the true answer of a question of the form 'free'"),
        ({"form": "describe"}, "truth: expected at least one attribute"),
        ({"form": "describe", "truth": {"color": "red"}}, "truth: expected one of .* got color: 'red'"),
        ({"form": "describe", "truth": {"colour": "reed"}}, "truth: expected one of .* got colour: 'reed'"),
        ({"image": "b.png"}, "image: no such file"),
        ({"regions": [{"box": [1, 2]}]}, "box: expected 4 numbers, got 2"),
    ],
)
def test_bad_questions_are_named_by_file_and_line(tmp_path: Path, change: dict, message: str) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    lines = ["", *[json.dumps(GOOD)] * 5, json.dumps(GOOD | change)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8-sig")
    with pytest.raises(InputError, match=rf"questions.jsonl:7: {message}"):
        read_questions(tmp_path)
    assert len(read_questions(tmp_path, limit=2)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", ":1: not JSON"), ("5", ":1: line: "), ("[" * 100_000, ":1: not JSON"), ("\n \n", "got none")],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "questions.jsonl").write_text(text)
    with pytest.raises(InputError, match=f"questions.jsonl.*{message}"):
        read_questions(tmp_path)
    with pytest.raises(InputError, match="expected questions, one JSON object a line"):
        read_questions(tmp_path / "nowhere")


def test_an_unusable_question_is_named(reference: Engine, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "questions.jsonl").write_text(json.dumps(GOOD | {"regions": [{"box": [50, 50, 60, 60]}]}))
    with pytest.raises(InputError, match=r"question q: regions\[0\]: box"):
        evaluate(reference, read_questions(tmp_path))


def test_accuracy_is_counted_by_split_attribute_and_form(reference: Engine, folder: Path) -> None:
    evaluation = evaluate(reference, read_questions(folder))
    assert evaluation.splits == ["left", "right"]
    assert evaluation.kinds() == [("colour", "free")]
    assert evaluation.accuracy() == Accuracy(8, 12)
    assert evaluation.accuracy("left", "colour", "free") == Accuracy(4, 6)
    assert evaluation.accuracy("left", "size") == Accuracy(0, 0)


@pytest.mark.parametrize("part", Part)
def test_without_a_part_the_answers_are_others_and_then_the_same_again(
    reference: Engine, folder: Path, part: Part
) -> None:
    questions = read_questions(folder)
    with without(part, reference) as engine:
        assert evaluate(engine, questions).accuracy().right < 8
    assert evaluate(reference, questions).accuracy() == Accuracy(8, 12)


def test_a_part_that_cannot_be_taken_out_is_refused_before_anything_is_asked(
    reference: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference.backend.model.encoder, "vision", lambda *_: None)  # as an exported tower is
    asked: list[None] = []
    with pytest.raises(RequestError, match="out of the torch tower only"):
        run_evaluations(reference, read_questions(folder), [Part.mask], on_answer=lambda: asked.append(None))
    assert not asked


def test_mask_free_or_replay_free_is_what_it_says(reference: Engine, folder: Path) -> None:
    prepared = reference.processor(read_questions(folder)[0].request)
    encoder = reference.backend.model.encoder  # type: ignore[attr-defined]
    image, *regions = encoder.encode(prepared.items)
    with without(Part.replay, reference):
        same, *zeros = encoder.encode(prepared.items)
    assert torch.equal(image, same)
    assert all(not row.any() for row in zeros)
    assert all(row.any() for row in regions)
    blank = [replace(item, masks=torch.zeros_like(item.masks)) for item in prepared.items]
    with without(Part.mask, reference):
        masked = encoder.encode(prepared.items)
    torch.testing.assert_close(masked, encoder.encode(blank))


def test_eval_command(mini: Path, folder: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    arguments = ["eval", "tiny", str(folder), "-c", str(mini), "--backend", "reference"]
    more = ["--json", "--ablation", "mask", "--ablation", "mask", "--answers", str(answers)]
    report = json.loads(CliRunner().invoke(app, [*arguments, *more], catch_exceptions=False).stdout)
    assert (report["questions"], report["right"], report["count"]) == (12, 8, 12)
    assert [(row["split"], row["accuracy"]) for row in report["rows"]] == [("left", 0.6667), ("right", 0.6667)]
    assert report["without"]["mask"]["accuracy"] < report["accuracy"]
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["right"]["colour"] for row in rows] == [number % 3 > 0 for number in range(12)]
    table = CliRunner().invoke(app, [*arguments, "--limit", "3"], catch_exceptions=False).stdout
    assert "True answers in %" in table
    assert "colour" in table


def test_a_report_says_what_it_is_of(mini: Path, folder: Path) -> None:
    arguments = ["eval", "tiny", str(folder), "-c", str(mini), "--backend", "reference", "--limit", "2"]
    arguments += ["--engine-option", "dtype=float32"]
    report = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert (report["checkpoint"], report["backend"]) == (str(mini), "reference")
    assert (report["data"], report["limit"], report["questions"]) == (str(folder), 2, 2)
    assert report["engine_options"] == ["dtype=float32"]
    assert report["runtime"] == "tower in torch, float32, decoder in float32"
    assert report["machine"]["torch"] == torch.__version__
    assert report["versions"]["garserve"]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout.replace("\n", "")
    for said in (f"questions of {folder}, --limit 2, --engine-option dtype=float32", report["runtime"]):
        assert said.replace(" ", "") in shown.replace(" ", "")
    assert torch.__version__ in shown


def test_counts_are_judgements(mini: Path, tmp_path: Path) -> None:
    """A description is one question, and is judged once for each attribute that is known of it."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    row = GOOD | {"form": "describe", "question": None, "truth": {"colour": "red", "size": "tiny"}}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    arguments = ["eval", "tiny", str(tmp_path), "-c", str(mini), "--backend", "reference"]
    report = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert (report["questions"], report["count"]) == (1, 2)
    table = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    assert "number of judgements" in " ".join(table.split())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--ablation", "mask"], RequestError, "--ablation: expected --backend reference, got vllm"),
        (["--answers", "/nowhere/a.jsonl"], InputError, "/nowhere/a.jsonl: no such folder: /nowhere"),
        (["--answers", "/"], InputError, "/: expected a file that can be written"),
    ],
)
def test_eval_command_refuses_before_it_starts(
    mini: Path, folder: Path, arguments: list[str], error: type[Exception], message: str
) -> None:
    result = CliRunner().invoke(app, ["eval", "tiny", str(folder), "-c", str(mini), *arguments])
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
