"""Asking an engine every question, and the table of how often it told the truth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from garserve.engine import Engine
from garserve.errors import GarserveError, InputError
from garserve.evaluation.ablation import checked, without
from garserve.evaluation.part import Part
from garserve.evaluation.questions import EvalQuestion
from garserve.evaluation.score import Accuracy, judge

Kind = tuple[str, str]  # attribute, form


@dataclass(frozen=True)
class Judged:
    """A question with its answer; `right` says of each attribute whether the answer is true."""

    question: EvalQuestion
    text: str
    right: dict[str, bool]


@dataclass(frozen=True)
class Evaluation:
    """All questions with their answers."""

    judged: list[Judged]

    @property
    def splits(self) -> list[str]:
        """Kinds of pictures, in the order in which they come."""
        return list(dict.fromkeys(one.question.split for one in self.judged))

    def kinds(self) -> list[Kind]:
        """Attributes and forms, attribute by attribute."""
        found = {(name, one.question.form) for one in self.judged for name in one.right}
        order = list(dict.fromkeys(name for one in self.judged for name in one.right))
        return sorted(found, key=lambda kind: (order.index(kind[0]), kind[1]))

    def accuracy(self, split: str | None = None, attribute: str | None = None, form: str | None = None) -> Accuracy:
        """Return the accuracy over the questions of a split, attribute and form (None: all)."""
        return Accuracy.of(
            flag
            for one in self.judged
            if split in (None, one.question.split) and form in (None, one.question.form)
            for name, flag in one.right.items()
            if attribute in (None, name)
        )

    def as_json(self) -> dict[str, Any]:
        """Return counts, accuracies and intervals by split, attribute and form."""
        rows = [
            {"split": split, "attribute": attribute, "form": form, **_numbers(self.accuracy(split, attribute, form))}
            for split in self.splits
            for attribute, form in self.kinds()
            if self.accuracy(split, attribute, form).count
        ]
        return {"questions": len(self.judged), **_numbers(self.accuracy()), "rows": rows}


def _numbers(accuracy: Accuracy) -> dict[str, Any]:
    share = None if accuracy.share is None else round(accuracy.share, 4)
    interval = [round(edge, 4) for edge in accuracy.interval]
    return {"right": accuracy.right, "count": accuracy.count, "accuracy": share, "interval": interval}


def evaluate(
    engine: Engine,
    questions: Sequence[EvalQuestion],
    *,
    in_flight: int = 64,
    on_answer: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Ask every question and judge the answers; InputError names the first question that cannot be used."""
    judged = []
    outcomes = engine.outcomes((one.request for one in questions), in_flight=in_flight)
    for question, answer in zip(questions, outcomes, strict=True):
        if isinstance(answer, GarserveError):
            raise InputError(f"question {question.request.id}: {answer}") from answer
        judged.append(Judged(question, answer.text, judge(question, answer.text)))
        on_answer()
    return Evaluation(judged)


def run_evaluations(
    engine: Engine, questions: Sequence[EvalQuestion], parts: Sequence[Part], *, on_answer: Callable[[], None]
) -> dict[str, Evaluation]:
    """Evaluate the model "whole", then without each of the parts, by their names.

    Raises RequestError before anything is asked where a part cannot be taken out.
    """
    for part in parts:
        checked(part, engine)
    results = {"whole": evaluate(engine, questions, on_answer=on_answer)}
    for part in parts:
        with without(part, engine):
            results[part] = evaluate(engine, questions, on_answer=on_answer)
    return results
