"""Questions with known answers, as a folder: `questions.jsonl` and the images that it names."""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from garserve.batch.sources import RequestLine
from garserve.errors import InputError
from garserve.evaluation.words import WORDS
from garserve.inputs.request import RegionRequest

PACKAGED = Path(str(files("garserve") / "data" / "tiny_eval"))
_LONGEST_ANSWER = 48  # tokens

Form = Literal["describe", "free", "yes/no", "choice", "which", "not given"]


class _QuestionLine(RequestLine):
    """A request with what is known of its answer: the whole of it, or for a description the words that are true."""

    id: str
    regions: Annotated[list[Any], Field(min_length=1)]
    split: str
    attribute: str
    form: Form
    answer: str | None = None
    truth: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_a_true_answer(self) -> "_QuestionLine":
        if self.form != "describe" and not self.answer:
            raise ValueError(f"answer: expected the true answer of a question of the form {self.form!r}")
        if self.form == "describe" and not self.truth:
            raise ValueError("truth: expected at least one attribute with its word")
        for name, word in self.truth.items():
            if word not in WORDS.get(name, ()):
                raise ValueError(f"truth: expected one of {WORDS.get(name) or sorted(WORDS)}, got {name}: {word!r}")
        return self


@dataclass(frozen=True)
class EvalQuestion:
    """One request and what is known of its answer."""

    request: RegionRequest
    split: str  # what kind of picture: "scenes", "photographs"
    attribute: str
    form: Form
    answer: str | None  # None for a description
    truth: dict[str, str]  # of a description: the words that are true, by attribute


def read_questions(folder: Path = PACKAGED, limit: int | None = None) -> list[EvalQuestion]:
    """Read a folder's questions, or `limit` of them, evenly taken from the whole.

    Raises InputError naming file and line where a line is no question, or where there is none.
    """
    path = folder / "questions.jsonl"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected questions, one JSON object a line ({error})") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise InputError(f"{path}: expected questions, one JSON object a line, got none")
    if limit is not None and limit < len(lines):
        lines = [lines[index * len(lines) // limit] for index in range(limit)]
    return [_question(folder, line, f"{path}:{number}") for number, line in lines]


def _question(folder: Path, line: str, where: str) -> EvalQuestion:
    try:
        read = _QuestionLine.model_validate(json.loads(line))
        request = read.request(folder, _LONGEST_ANSWER)
        if isinstance(request.image, Path) and not request.image.is_file():
            raise InputError(f"image: no such file: {request.image}")
    except ValidationError as error:
        first = error.errors()[0]
        field, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        if not field and first["type"] == "value_error":
            raise InputError(f"{where}: {message}") from None
        raise InputError(f"{where}: {field or 'line'}: {message}, got {first.get('input')!r:.80}") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    return EvalQuestion(request, read.split, read.attribute, read.form, read.answer, read.truth)
