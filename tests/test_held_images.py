"""Images that several requests name: read-only, known again, and never taken for another."""

from pathlib import Path

import numpy as np

from garserve.bench.workload import picture
from garserve.config import read_config
from garserve.inputs.images import hold_image
from garserve.inputs.processor import Processor
from garserve.inputs.request import RegionRequest
from tests.conftest import ROOT

SIZE = (120, 90)


def test_a_held_image_is_the_engines_own() -> None:
    own = np.zeros((8, 9, 3), np.uint8)
    held = hold_image(own)
    own[:] = 7
    assert not held.any()
    assert not held.flags.writeable
    assert hold_image(held) is held
    assert hold_image(ROOT / "garserve" / "data" / "coffee.jpg").flags.writeable is False


def test_an_image_is_known_by_its_pixels_when_they_may_change(mini: Path) -> None:
    processor = Processor(mini, read_config(mini))
    box = [[10, 10, 60, 60]]
    own = picture(0, SIZE).copy()
    first = processor(RegionRequest(own, box)).items[0].hash
    own[:] = picture(1, SIZE)
    second = processor(RegionRequest(own, box)).items[0].hash
    assert first != second
    for number, expected in ((0, first), (1, second)):
        held = hold_image(picture(number, SIZE).copy())
        assert [processor(RegionRequest(held, box)).items[0].hash for _ in range(2)] == [expected] * 2
    fewer = processor.variant(max_num_tiles=1)
    assert fewer(RegionRequest(held, box)).items[0].hash == fewer(RegionRequest(held.copy(), box)).items[0].hash


def test_ids_of_images_that_are_gone_name_nothing(mini: Path) -> None:
    processor = Processor(mini, read_config(mini))
    for number in range(200):  # memory, and with it the id, is taken again by the next image
        held = hold_image(np.full((20, 20, 3), number % 250, np.uint8))
        assert int(processor(RegionRequest(held, [[1, 1, 9, 9]])).items[0].tiles[0, 0, 0, 0]) == number % 250
        del held
