"""Three regions of a photograph that comes with garserve, described and related by the tiny checkpoint (floor 7)."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from garserve.answers import Answer
from garserve.engine import Engine
from garserve.inputs.images import load_image
from garserve.inputs.processor import draw_masks
from garserve.inputs.regions import Region
from garserve.pictures import check_target, save_picture

QUESTION = "Where is <Prompt0> relative to <Prompt1>?"

REGIONS = {
    "saucer": Region.from_polygon(
        [84, 200, 100, 150, 140, 100, 170, 82, 175, 130, 172, 180, 190, 225, 196, 300, 210, 360, 150, 330, 105, 280]
    ),
    "table": Region.from_box([480, 300, 540, 395]),
    "coffee": Region.from_polygon(
        [213, 131, 237, 110, 277, 100, 319, 107, 349, 129, 363, 159, 347, 178, 303, 189, 255, 185, 222, 161]
    ),
}


def run_demo(engine: Engine, picture: Path) -> Iterator[tuple[str, Answer]]:
    """Yield each answer with a name for its line, then save the picture of regions and answers."""
    check_target(picture)
    image = load_image(Path(str(files("garserve") / "data" / "coffee.jpg")))
    regions = list(REGIONS.values())
    captions = []
    for name, answer in zip(REGIONS, engine.describe(image, regions), strict=True):
        captions.append(answer.text)
        yield f"{len(captions) - 1} ({name})", answer
    relation = engine.ask(image, regions[:2], QUESTION)
    yield QUESTION, relation
    save_picture(picture, image, draw_masks(regions, *image.shape[:2]), captions, f"{QUESTION} {relation.text}")
