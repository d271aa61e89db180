"""Several turns about the same regions (floor 4)."""

from collections.abc import Callable
from dataclasses import replace

from garserve.answers import Answer
from garserve.errors import RequestError
from garserve.inputs.request import RegionRequest, Turn


class Chat:
    """A conversation about the same regions: each answer becomes part of the next question's prompt."""

    def __init__(self, answer: Callable[[RegionRequest], Answer], opening: RegionRequest) -> None:
        """Begin with a request that asks nothing yet; `answer` is what answers."""
        self._answer = answer
        self._request = opening
        self._begun = False

    def say(self, text: str | None = None) -> Answer:
        """Say something and return the answer. Saying nothing first asks for the description of the one region.

        Texts call the regions `<Prompt0>`, `<Prompt1>`, … in their order; after a description, which is made in the
        authors' form, its region is `<Prompt1>`. Raises RequestError for another name, and the chat can go on.
        """
        request = self._request
        if not self._begun:
            request = replace(request, question=text)
        elif text is not None:
            request = replace(request, turns=(*request.turns, Turn("user", text)))
        else:
            raise RequestError("say: expected a text; only the first turn of a chat can do without")
        answer = self._answer(request)
        self._begun = True
        self._request = replace(request, turns=(*request.turns, Turn("assistant", answer.text)))
        return answer
