"""The file format of OpenAI's batches: {"custom_id", "method", "url", "body"} a line, the body a chat request.

The regions are in the body, as "regions", or beside "image_url", as garserve's server takes them, too, or in
"mm_processor_kwargs", as plain vLLM has them.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlparse

from pydantic import BaseModel, ConfigDict, Field

from garserve.batch.lines import LineSource
from garserve.batch.record import Record
from garserve.batch.request_line import located_region
from garserve.errors import RequestError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class _ImageURL(_Strict):
    url: str


class _Image(_Strict):
    type: Literal["image_url"]
    image_url: _ImageURL
    regions: list[Any] | None = None


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[_Image | _Text, Field(discriminator="type")]]

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, _Text))

    def images(self) -> list[_Image]:
        return [] if isinstance(self.content, str) else [part for part in self.content if isinstance(part, _Image)]


class _Kwargs(_Strict):
    regions: list[Any] | None = None


class _Body(_Strict):
    messages: list[_Message]
    regions: list[Any] | None = None
    mm_processor_kwargs: _Kwargs = Field(default_factory=_Kwargs)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None


class _Line(_Strict):
    custom_id: str
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions"] = "/v1/chat/completions"
    body: _Body


class OpenAISource(LineSource):
    """One chat request a line."""

    id_field = "custom_id"

    def read(self, data: Any, place: str) -> Record:
        """Return a line as a record; an error where it cannot be one."""
        return _record(_Line.model_validate(data), place, self._folder)


def _record(line: _Line, place: str, folder: Path) -> Record:
    messages = list(line.body.messages)
    options: dict[str, Any] = {}
    if messages and messages[0].role in ("system", "developer"):
        options["system"] = messages.pop(0).text()
    images = [image for message in messages for image in message.images()]
    if not messages or messages[0].role != "user" or len(messages[0].images()) != 1 or len(images) != 1:
        raise RequestError(f"messages: expected one image, in the first message of the user, got {len(images)}")
    if len(messages) > 1:
        options["turns"] = [[message.role, message.text()] for message in messages[1:]]
    places = (images[0].regions, line.body.regions, line.body.mm_processor_kwargs.regions)
    regions = next((found for found in places if found is not None), None)
    if regions is None:
        raise RequestError("body: regions: missing; a request names the regions of its image")
    most = line.body.max_completion_tokens
    image = _local(images[0].image_url.url, folder)
    options |= {
        "question": messages[0].text().strip() or None,
        "max_tokens": line.body.max_tokens if most is None else most,
        "temperature": line.body.temperature,
        "seed": line.body.seed,
    }
    return Record(
        place=place,
        id=line.custom_id,
        image=image,
        image_name="data URL" if image.startswith("data:") else image,
        regions=tuple(located_region(region, folder) for region in regions),
        options={name: value for name, value in options.items() if value is not None},
    )


def _local(url: str, folder: Path) -> str:
    """Return a data URL as it is and anything else as a path; nothing is fetched from elsewhere."""
    if url.startswith("data:"):
        return url
    parsed = urlparse(url)
    if parsed.scheme not in ("", "file"):
        raise RequestError(f"image_url: expected a data URL, a path or file://, got {url!r:.80}; nothing is fetched")
    return os.path.abspath(folder / (unquote(parsed.path) if parsed.scheme else url))
