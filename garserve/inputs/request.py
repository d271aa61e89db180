"""What a user asks for: one image, its regions, and what to say about them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from garserve.errors import RequestError
from garserve.inputs.encoded import EncodedImage
from garserve.inputs.images import ImageSource
from garserve.inputs.regions import Region
from garserve.inputs.tokenizer import PROMPT_NAME

_HOTTEST = 2  # vLLM's own limit
_LONGEST = 1_000_000  # tokens of an answer, beyond any decoder's length


@dataclass(frozen=True)
class Turn:
    """One later turn of a conversation about the same regions."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class RegionRequest:
    """One image with its regions and a question about them.

    Without a question, the one region is described in the authors' single-region form. With a question, the regions
    are `<Prompt0>`, `<Prompt1>`, … in their order (the multi-region form). `focus` lists only some of the regions in
    the prompt, while the image is still encoded with all of them marked: requests that differ in `focus` or question
    share the image's encoding and its KV blocks. `turns` continue the conversation, the last one being the user's.
    After a description they call its region as its prompt did, `<Prompt1>`.

    A question that names a region which the prompt does not list is refused, unless `check_names` is false: then the
    model is asked, and may say so itself.

    An EncodedImage holds its regions already; `regions` is empty then, and all else as before.

    Tokens are the most probable ones at `temperature` 0; `max_tokens` bounds the answer.
    """

    image: ImageSource | EncodedImage
    regions: Sequence[Any]  # Region, or what Region.parse takes
    question: str | None = None
    system: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None
    focus: Sequence[int] | None = None
    prompt_index: int | None = None  # which <PromptK> names the region of the single-region form; the authors' is 1
    turns: Sequence[Turn] = field(default_factory=tuple)
    id: str | None = None
    check_names: bool = True

    @property
    def region_count(self) -> int:
        """How many regions there are."""
        return len(self.image.regions) if isinstance(self.image, EncodedImage) else len(self.regions)

    def parsed_regions(self) -> list[Region]:
        """Return the regions as Region objects; RequestError where there is none."""
        if isinstance(self.regions, str | bytes | dict | Region) or not hasattr(self.regions, "__len__"):
            raise RequestError(f"regions: expected a list of regions, got {type(self.regions).__name__}")
        if len(self.regions) == 0:
            raise RequestError("regions: expected at least one region, got none")
        return [Region.parse(region) for region in self.regions]

    def check(self, prompt_count: int) -> None:
        """Check that regions, question and options fit together and fit a checkpoint with `prompt_count` prompts.

        Raises RequestError naming the field, what was expected and what came.
        """
        if isinstance(self.image, EncodedImage) and len(self.regions):
            raise RequestError(f"regions: an encoded image holds its own; expected none, got {len(self.regions)}")
        count = self.region_count
        if count > prompt_count:
            raise RequestError(f"regions: this checkpoint takes at most {prompt_count} regions at once, got {count}")
        if self.question is None:
            self._check_single(count, prompt_count)
        else:
            _check_text("question", self.question)
        if self.system is not None:
            _check_text("system", self.system, empty=True)
        self._check_sampling()
        if self.question is not None and self.prompt_index is not None:
            raise RequestError("prompt_index: only without a question; with one, regions are named in their order")
        self._check_focus(count)
        self._check_turns()
        if self.check_names:
            self._check_names(prompt_count)

    def listed(self) -> list[int]:
        """Return the positions in `regions` that the prompt lists; they are also the numbers K of their `<PromptK>`."""
        return list(self.focus) if self.focus is not None else list(range(self.region_count))

    def described_as(self, prompt_count: int) -> int:
        """Return the K of the `<PromptK>` that a description's prompt calls its region, of so many prompts."""
        return self.prompt_index if self.prompt_index is not None else min(1, prompt_count - 1)

    def _check_sampling(self) -> None:
        if type(self.max_tokens) is not int or not 1 <= self.max_tokens <= _LONGEST:
            raise RequestError(f"max_tokens: expected at least 1 (and at most {_LONGEST}), got {self.max_tokens!r:.80}")
        if type(self.temperature) not in (int, float) or not 0 <= self.temperature <= _HOTTEST:
            raise RequestError(f"temperature: expected 0 to {_HOTTEST}, got {self.temperature!r:.80}")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**63):
            raise RequestError(f"seed: expected a whole number of 0 to 2**63 - 1, got {self.seed!r:.80}")

    def _check_single(self, count: int, prompt_count: int) -> None:
        if count != 1:
            raise RequestError(
                f"question: {count} regions need one, a question such as 'How does <Prompt0> relate to <Prompt1>?'"
            )
        if self.focus is not None:
            raise RequestError("focus: only with a question; without one there is a single region")
        if self.prompt_index is None:
            return
        if type(self.prompt_index) is not int or not 0 <= self.prompt_index < prompt_count:
            raise RequestError(f"prompt_index: expected 0 to {prompt_count - 1}, got {self.prompt_index!r:.80}")

    def _check_focus(self, count: int) -> None:
        if self.focus is None:
            return
        if not self.focus or any(not isinstance(k, int) or not 0 <= k < count for k in self.focus):
            raise RequestError(f"focus: expected positions 0 to {count - 1} in regions, got {list(self.focus)!r:.80}")
        if len(set(self.focus)) != len(self.focus):
            raise RequestError(f"focus: names a region twice: {list(self.focus)}")

    def _check_turns(self) -> None:
        for position, turn in enumerate(self.turns):
            expected = "assistant" if position % 2 == 0 else "user"
            if turn.role != expected:
                raise RequestError(f"turns[{position}]: expected the {expected}'s turn, got the {turn.role}'s")
            _check_text(f"turns[{position}]", turn.text, empty=turn.role == "assistant")
        if self.turns and self.turns[-1].role != "user":
            raise RequestError("turns: the last one must be the user's")

    def _check_names(self, prompt_count: int) -> None:
        described = self.question is None
        names = [self.described_as(prompt_count)] if described else sorted(set(self.listed()))
        given = [f"<Prompt{name}>" for name in names]
        told = "the region that was described is" if described else "the regions given are"
        texts = [("question", self.question or "")]
        texts += [(f"turns[{i}]", turn.text) for i, turn in enumerate(self.turns) if turn.role == "user"]
        for where, text in texts:
            for named in PROMPT_NAME.finditer(text):
                if named[0] not in given:
                    raise RequestError(f"{where}: names {named[0]:.40}, but {told} {', '.join(given)}")


def _check_text(field: str, text: object, *, empty: bool = False) -> None:
    if not isinstance(text, str) or not (empty or text.strip()):
        raise RequestError(f"{field}: expected a text, got {text!r:.80}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{field}: half a character (a lone surrogate) at position {error.start}") from None
