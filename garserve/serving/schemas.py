"""What clients send and get, as the OpenAPI document has it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

_FIELDS = 64  # of any object: the largest one, a chat's request, knows fewer than 40
_REGIONS = 100_000  # what a list may hold before the server's own limit is asked
# All of `n` answers' seeds, one after the other, have to fit into 64 bits.
_Seed = Annotated[int, Field(ge=0, le=2**63 - 8)]

_REGION_SCHEMA: dict[str, Any] = {
    "title": "Region",
    "description": (
        "Exactly one form, in pixels of the upright image: a box [x1, y1, x2, y2] or [x, y, width, height], a polygon, "
        "COCO's RLE, points with a radius, a scribble with a width, or a mask as a PNG data URL."
    ),
    "type": "object",
    "properties": {
        "box": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
        "xywh": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
        "clip": {"type": "boolean", "description": "Cut a box at the image's edge instead of refusing it."},
        "polygon": {"type": "array", "items": {}, "description": "[[x, y], …], COCO's flat list, or a list of them."},
        "rle": {
            "type": "object",
            "properties": {
                "size": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
                "counts": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
            },
            "required": ["size", "counts"],
        },
        "points": {"type": "array", "items": {}},
        "radius": {"type": "number", "exclusiveMinimum": 0, "maximum": 10_000},
        "scribble": {"type": "array", "items": {}},
        "width": {"type": "number", "exclusiveMinimum": 0, "maximum": 20_000},
        "mask": {"type": "string", "description": "data:image/png;base64,…, of the image's size"},
    },
    "additionalProperties": False,
    "minProperties": 1,
    "examples": [{"box": [196, 228, 262, 310]}, {"points": [[366, 283]], "radius": 41}],
}


def _few_fields(value: object) -> object:
    """Refuse an object of very many fields before each of them becomes a complaint of its own."""
    if isinstance(value, dict) and len(value) > _FIELDS:
        raise PydanticCustomError("too_many_fields", "expected at most {most} fields", {"most": _FIELDS})
    return value


RegionJSON = Annotated[dict[str, Any], Field(json_schema_extra=_REGION_SCHEMA), BeforeValidator(_few_fields)]
# Lists end at the first element that is wrong: a complaint about each takes hundreds of times an element's memory.
_Regions = Annotated[list[RegionJSON], Field(max_length=_REGIONS, fail_fast=True)]

_EXAMPLE_IMAGE = "data:image/png;base64,iVBORw0KGgo…"


class Strict(BaseModel):
    """Unknown fields are refused by name, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, data: object) -> object:
        return _few_fields(data)


class ImageURL(Strict):
    """Where an image is: a data URL, or what the server's operator allows of http(s):// and file://."""

    url: str = Field(min_length=1)
    detail: str | None = Field(None, description="Taken and ignored.")


class ImagePart(Strict):
    """The picture, with its regions."""

    type: Literal["image_url"]
    image_url: ImageURL
    regions: _Regions | None = Field(
        None,
        description="`<Prompt0>`, `<Prompt1>`, … in this order. Without it, what is not fully transparent is the one.",
    )


class TextPart(Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


_Part = Annotated[ImagePart | TextPart, Field(discriminator="type")]
_Nothing = Annotated[list[Any], Field(max_length=0)] | None


class Message(Strict):
    """One turn. The picture is in the user's first one.

    An answer's message may be sent back as it came: what answers here never hold is taken while it is empty.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(max_length=256, fail_fast=True)]
    name: str | None = Field(None, description="Taken and ignored.")
    refusal: None = None
    audio: None = None
    function_call: None = None
    reasoning: None = None
    reasoning_content: None = None
    annotations: _Nothing = None
    tool_calls: _Nothing = None

    def text(self) -> str:
        """Return all its text."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    def images(self) -> list[ImagePart]:
        """Return its pictures."""
        return [] if isinstance(self.content, str) else [part for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(Strict):
    """OpenAI's options of a stream."""

    include_usage: bool = False


class ChatRequest(Strict):
    """A chat about the regions of one image: OpenAI's request, with `regions` beside `image_url`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "tiny",
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {
                                    "type": "image_url",
                                    "image_url": {"url": _EXAMPLE_IMAGE},
                                    "regions": [{"box": [196, 228, 262, 310]}, {"points": [[366, 283]], "radius": 41}],
                                },
                                {"type": "text", "text": "Where is <Prompt0> relative to <Prompt1>?"},
                            ],
                        }
                    ],
                    "stream": False,
                    "max_tokens": 64,
                }
            ]
        },
    )
    messages: list[Message] = Field(min_length=1, max_length=256, fail_fast=True)
    model: str | None = Field(None, description="One of /v1/models; the served one by default.")
    regions: _Regions | None = Field(None, description="The regions, where a client cannot put them into the message.")
    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="256 by default.")
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2, description="0 by default: the most probable token each time.")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: _Seed | None = None
    n: int | None = Field(None, ge=1, le=8)
    stop: (
        Annotated[str, Field(min_length=1, max_length=200)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=4)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    return_token_ids: bool | None = Field(None, description="vLLM's extension: ids beside texts.")
    user: str | None = Field(None, description="Taken and ignored.")
    metadata: Annotated[dict[str, str], BeforeValidator(_few_fields)] | None = Field(
        None, description="Taken and ignored."
    )
    store: bool | None = Field(None, description="Taken and ignored.")


class DescribeRequest(Strict):
    """One image and any number of regions, each described by itself."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"image": _EXAMPLE_IMAGE, "regions": [{"box": [196, 228, 262, 310]}], "stream": False, "max_tokens": 64}
            ]
        },
    )
    image: str = Field(min_length=1, description="data:…, or what the operator allows of http(s):// and file://")
    regions: _Regions | None = Field(None, description="Without it, what is not fully transparent is the region.")
    model: str | None = None
    stream: bool = Field(False, description="Server-sent events: pieces of captions, and each caption as it is done.")
    max_tokens: int = Field(256, ge=1, le=1_000_000)
    temperature: float = Field(0.0, ge=0, le=2)
    seed: _Seed | None = None


class Usage(BaseModel):
    """Tokens of all prompts and answers together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorBody(BaseModel):
    """Every answer that is an error."""

    error: ErrorDetail


class Description(BaseModel):
    """What was said about one region, or why nothing was."""

    index: int = Field(description="The region's place in the request.")
    text: str | None = None
    finish_reason: Literal["stop", "length"] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: ErrorDetail | None = None


class Descriptions(BaseModel):
    """The captions of all regions, in the order in which the regions were given."""

    id: str
    object: Literal["regions.descriptions"] = "regions.descriptions"
    created: int
    model: str
    descriptions: list[Description]
    usage: Usage
