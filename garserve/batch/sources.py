"""Reading requests from JSON lines, one at a time."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from garserve.errors import InputError, RequestError
from garserve.inputs.encoded import SUFFIX, EncodedImage
from garserve.inputs.regions import Region
from garserve.inputs.request import RegionRequest


class RequestLine(BaseModel):
    """One line of a requests file. Other keys (answers, labels of a data set) are left alone, but not misspelt ones.

    `image` is a path, relative to the file, or a data URL; a path to a file of `garserve encode` stands for its image
    and its regions, and `regions` is empty then. `regions` are as Region.parse takes them. With `choices`
    the question is asked as the authors' evaluation asks it.
    """

    model_config = ConfigDict(extra="ignore", strict=True)
    id: str | int | None = None
    image: str = Field(min_length=1)
    regions: list[Any]
    question: str | None = None
    choices: list[str] = Field(default_factory=list)
    system: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int | None = None
    focus: list[int] | None = None
    prompt_index: int | None = None
    check_names: bool = True

    @model_validator(mode="before")
    @classmethod
    def _no_misspelt_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in sorted(str(key) for key in data if key not in cls.model_fields):
                if near := get_close_matches(key, set(cls.model_fields) - set(data), cutoff=0.8):
                    raise ValueError(f"unknown field {key!r}, did you mean {near[0]!r}?")
        return data

    def request(self, folder: Path, max_tokens: int) -> RegionRequest:
        """Return the line as a request; a relative image or mask path is taken from `folder`."""
        image: str | Path | EncodedImage = self.image if self.image.startswith("data:") else folder / self.image
        if isinstance(image, Path) and image.suffix == SUFFIX:
            image = EncodedImage.load(image)
        return RegionRequest(
            image=image,
            regions=[Region.parse(_located(region, folder)) for region in self.regions],
            question=self._asked(),
            system=self.system,
            max_tokens=max_tokens if self.max_tokens is None else self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            focus=self.focus,
            prompt_index=self.prompt_index,
            id=None if self.id is None else str(self.id),
            check_names=self.check_names,
        )

    def _asked(self) -> str | None:
        if not self.choices:
            return self.question
        if self.question is None:
            raise RequestError("choices: only with a question")
        options = "".join(f"\n{choice}" for choice in self.choices)
        return f"Question: {self.question}\nOptions:{options}\nAnswer with the correct option's letter directly."


def _located(region: Any, folder: Path) -> Any:
    if isinstance(region, dict) and isinstance(region.get("mask"), str):
        return {**region, "mask": folder / region["mask"]}
    return region


@dataclass(frozen=True)
class Line:
    """One line of the input: its number from 1, its id if it has one, and its request or what is wrong with it."""

    number: int
    id: str | int | None
    request: RegionRequest | InputError


def read_lines(path: Path, max_tokens: int) -> Iterator[Line]:
    """Yield every line that is not blank; a bad one is yielded with its error, and the next is read."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield _read_line(number, raw, path.parent, max_tokens)


def _read_line(number: int, raw: bytes, folder: Path, max_tokens: int) -> Line:
    identity: str | int | None = None
    try:
        data = json.loads(raw)
        if isinstance(data, dict) and isinstance(data.get("id"), str | int):
            identity = data["id"]
        return Line(number, identity, RequestLine.model_validate(data).request(folder, max_tokens))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "line"
        return Line(number, identity, RequestError(f"{where}: {first['msg']}, got {first['input']!r:.80}"))
    except InputError as error:
        return Line(number, identity, error)
    except (ValueError, RecursionError) as error:  # broken syntax, broken UTF-8, numbers of thousands of digits
        return Line(number, identity, RequestError(f"not JSON ({error})"))
    except (TypeError, LookupError, ArithmeticError) as error:  # values of a kind that no field takes
        return Line(number, identity, RequestError(f"cannot be used ({type(error).__name__}: {error})"))
