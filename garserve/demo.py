"""Three regions of a photograph that comes with garserve, described and related (floor 6)."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from garserve.engine import Answer, Engine
from garserve.inputs.images import load_image
from garserve.inputs.processor import draw_masks
from garserve.inputs.regions import Region
from garserve.pictures import check_target, save_picture

NOTE = "The weights of this demonstration are random: everything is computed for real, but the sentences mean nothing."
QUESTION = "What is the relation of <Prompt0> to <Prompt1>?"
_TOKENS = 24

REGIONS = {
    "coffee": Region.from_polygon(
        [206, 130, 232, 107, 276, 96, 322, 104, 354, 128, 369, 160, 352, 181, 304, 193, 252, 188, 216, 162]
    ),
    "spoon": Region.from_points([[366, 283]], radius=41),
    "handle": Region.from_box([196, 228, 262, 310]),
}


def run_demo(engine: Engine, picture: Path) -> Iterator[tuple[str, Answer]]:
    """Yield each answer with a name for its line, then save the picture of regions and answers."""
    check_target(picture)
    image = load_image(Path(str(files("garserve") / "data" / "coffee.jpg")))
    regions = list(REGIONS.values())
    captions = []
    for name, answer in zip(REGIONS, engine.describe(image, regions, max_tokens=_TOKENS), strict=True):
        captions.append(answer.text)
        yield f"{len(captions) - 1} ({name})", answer
    yield QUESTION, engine.ask(image, regions[:2], QUESTION, max_tokens=_TOKENS)
    save_picture(picture, image, draw_masks(regions, *image.shape[:2]), captions, NOTE)
