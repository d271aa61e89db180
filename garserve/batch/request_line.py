"""One request as JSON: the fields of a line of a requests file, checked."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from garserve.batch.record import Record
from garserve.batch.source import check_local
from garserve.errors import RequestError
from garserve.inputs.encoded import SUFFIX, EncodedImage
from garserve.inputs.regions import Region
from garserve.inputs.request import RegionRequest

_ABOUT = 0.86  # how alike "category" and its misspellings are; data sets have a category_id, too
_OPTIONS = ("system", "max_tokens", "temperature", "seed", "focus", "prompt_index", "check_names")


class RequestLine(BaseModel):
    """One line of a requests file. Other keys (answers, labels of a data set) are left alone, but not misspelt ones.

    `image` is a path, relative to the file, or a data URL; a path to a file of `garserve encode` stands for its image
    and its regions, and `regions` is empty then. `regions` are as Region.parse takes them. With `choices` the question
    is asked as the authors' evaluation asks it.
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
            for key in sorted(str(key) for key in data if key not in {*cls.model_fields, "category"}):
                near = get_close_matches(key, set(cls.model_fields) - set(data), cutoff=0.8)
                near += get_close_matches(key, {"category"} - set(data), cutoff=_ABOUT)
                if near:
                    raise ValueError(f"unknown field {key!r}, did you mean {near[0]!r}?")
        return data

    def request(self, folder: Path, max_tokens: int) -> RegionRequest:
        """Return the line as a request; a relative image or mask path is taken from `folder`."""
        image: str | Path | EncodedImage = self.image if self._is_data() else folder / self.image
        if isinstance(image, Path) and image.suffix == SUFFIX:
            image = EncodedImage.load(image)
        return RegionRequest(
            image=image,
            regions=[Region.parse(located_region(region, folder)) for region in self.regions],
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

    def record(self, folder: Path, place: str, category: str | None = None) -> Record:
        """Return the line as a record, in which regions are not looked at yet; its paths are taken from `folder`."""
        image = self.image if self._is_data() else os.path.abspath(folder / self.image)
        options = {name: getattr(self, name) for name in _OPTIONS if name in self.model_fields_set}
        options |= {"question": self._asked()}
        return Record(
            place=place,
            id=self.id,
            image=image,
            image_name="data URL" if image.startswith("data:") else image,
            regions=tuple(located_region(region, folder) for region in self.regions),
            options={name: value for name, value in options.items() if value is not None},
            category=category,
        )

    def _is_data(self) -> bool:
        """Say whether the image is a data URL rather than a path; RequestError for any other URL."""
        if self.image.startswith("data:"):
            return True
        check_local("image", self.image)
        return False

    def _asked(self) -> str | None:
        if not self.choices:
            return self.question
        if self.question is None:
            raise RequestError("choices: only with a question")
        options = "".join(f"\n{choice}" for choice in self.choices)
        return f"Question: {self.question}\nOptions:{options}\nAnswer with the correct option's letter directly."


def located_region(region: Any, folder: Path) -> Any:
    """Return a region as JSON with its mask's path, where it has one, taken from `folder`."""
    if isinstance(region, dict) and isinstance(region.get("mask"), str) and not region["mask"].startswith("data:"):
        return {**region, "mask": os.path.abspath(folder / region["mask"])}
    return region


def read_line(data: Any) -> RequestLine:
    """Check decoded JSON; RequestError names the field, what was expected and what came."""
    try:
        return RequestLine.model_validate(data)
    except ValidationError as error:
        raise refusal(error) from None


def refusal(error: ValidationError) -> RequestError:
    """Return pydantic's first complaint as an error of garserve's."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "line"
    return RequestError(f"{where}: {first['msg']}, got {first['input']!r:.80}")
