"""What later turns call the regions, and where a conversation that cannot be used is said to be wrong."""

import pytest

from garserve.answers import Answer
from garserve.chat import Chat
from garserve.errors import RequestError
from garserve.inputs.request import RegionRequest, Turn

BOX = {"box": [10, 10, 60, 60]}
SAID = Turn("assistant", "A cup.")


def answered(request: RegionRequest) -> Answer:
    request.check(5)
    return Answer(f"turn {len(request.turns)}", [1], "stop", 9, 0)


def test_after_a_description_its_region_has_the_name_of_its_prompt() -> None:
    chat = Chat(answered, RegionRequest("x", [BOX]))
    assert chat.say().text == "turn 0"
    with pytest.raises(
        RequestError, match=r"turns\[1\]: names <Prompt0>, but the region that was described is <Prompt1>$"
    ):
        chat.say("What colour is <Prompt0>?")
    assert chat.say("What colour is <Prompt1>?").text == "turn 2"


def test_after_a_question_regions_have_their_places_names() -> None:
    chat = Chat(answered, RegionRequest("x", [BOX]))
    chat.say("What is <Prompt0>?")
    with pytest.raises(RequestError, match=r"turns\[1\]: names <Prompt1>, but the regions given are <Prompt0>$"):
        chat.say("What colour is <Prompt1>?")
    assert chat.say("What colour is <Prompt0>?").text == "turn 2"


@pytest.mark.parametrize(("prompts", "index", "name"), [(5, None, 1), (2, None, 1), (1, None, 0), (5, 0, 0), (5, 3, 3)])
def test_the_name_is_the_one_in_the_prompt(prompts: int, index: int | None, name: int) -> None:
    """Also of a checkpoint that has one prompt only."""

    def request(named: int) -> RegionRequest:
        return RegionRequest("x", [BOX], prompt_index=index, turns=[SAID, Turn("user", f"And <Prompt{named}>?")])

    request(name).check(prompts)
    for other in {0, 1, 2} - {name}:
        with pytest.raises(RequestError, match=f"names <Prompt{other}>, but the region .* is <Prompt{name}>"):
            request(other).check(prompts)
