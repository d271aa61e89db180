"""The definitions of what can be truly said of regions: plain cases, margins, and that stretching changes nothing."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train_tiny import training_module

attributes = training_module("attributes")

NAMED = {
    "black": [(0, 0, 0), (20, 20, 24), (0, 0, 40), (40, 0, 0)],
    "white": [(255, 255, 255), (245, 245, 240), (255, 240, 225)],
    "grey": [(128, 128, 128), (90, 92, 95)],
    "red": [(255, 0, 0), (178, 34, 34), (220, 20, 60)],
    "orange": [(255, 165, 0), (255, 140, 0)],
    "yellow": [(255, 255, 0), (255, 215, 0), (240, 230, 140), (255, 250, 205)],
    "green": [(0, 128, 0), (50, 205, 50), (107, 142, 35), (85, 107, 47)],
    "blue": [(0, 0, 255), (0, 0, 128), (135, 206, 235), (65, 105, 225)],
    "purple": [(128, 0, 128), (75, 0, 130), (148, 0, 211)],
    "pink": [(255, 192, 203), (255, 105, 180), (255, 182, 193), (255, 20, 147)],
    "brown": [(139, 69, 19), (160, 82, 45), (101, 67, 33), (210, 180, 140)],
}


def rectangle(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def disc(height: int, width: int, x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] + 0.5
    return np.hypot(columns - x, rows - y) <= radius


@pytest.mark.parametrize(("name", "rgb"), [(name, rgb) for name, all_of in NAMED.items() for rgb in all_of])
def test_colours_that_everybody_names_alike(name: str, rgb: tuple[int, int, int]) -> None:
    image = np.full((90, 120, 3), 255 - np.array(rgb), np.uint8)
    mask = rectangle(90, 120, (30, 20, 70, 60))
    image[mask] = rgb
    assert attributes.colour(image, mask) == name


def test_lab_of_known_colours() -> None:
    lab = attributes.srgb_to_lab(np.array([[255.0, 255, 255], [255, 0, 0], [0, 0, 255], [0, 0, 0]]))
    expected = [[100, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86], [0, 0, 0]]
    np.testing.assert_allclose(lab, expected, atol=0.02)


def test_mixed_colours_are_unclear() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    image[:, :45], image[:, 45:] = (255, 0, 0), (0, 0, 255)
    everything = np.ones((100, 100), bool)
    assert attributes.colour(image, everything) is None
    assert attributes.colour(image, rectangle(100, 100, (0, 0, 70, 100))) == "red"


@pytest.mark.parametrize("size", [(30, 40), (100, 100), (301, 200)])
def test_three_votes_to_two_are_unclear_at_any_size(size: tuple[int, int]) -> None:
    plain = np.full((*size, 3), (229, 203, 180), np.uint8)
    assert sorted(attributes.colour_shares(plain, np.ones(size, bool)))[-2:] == pytest.approx([0.4, 0.6])
    assert attributes.colour(plain, np.ones(size, bool)) is None


def test_a_colour_is_clear_above_one_and_a_half_times_the_second() -> None:
    everything = np.ones((100, 100), bool)
    for red, expected in ((60, None), (61, "red")):
        image = np.zeros((100, 100, 3), np.uint8)
        image[:, :red], image[:, red:] = (255, 0, 0), (0, 0, 255)
        assert attributes.colour(image, everything) == expected


@pytest.mark.parametrize(
    ("area", "expected"),
    [(0.002, "tiny"), (0.0095, None), (0.0105, None), (0.02, "small"), (0.05, None), (0.1, "medium"), (0.3, "large")],
)
def test_size(area: float, expected: str | None) -> None:
    mask = np.zeros(100_000, bool)
    mask[: round(area * 100_000)] = True
    assert attributes.size(mask.reshape(250, 400)) == expected


@pytest.mark.parametrize("index", range(9))
def test_position(index: int) -> None:
    x, y = 50 + 100 * (index % 3), 30 + 60 * (index // 3)
    mask = rectangle(180, 300, (x - 10, y - 10, x + 10, y + 10))
    assert attributes.position(mask) == attributes.POSITIONS[index]


def test_position_near_a_third_is_unclear() -> None:
    mask = rectangle(180, 300, (95, 80, 107, 100))
    assert attributes.position(mask) is None
    assert attributes.nominal_position(mask) == "centre"


def test_shapes() -> None:
    assert attributes.shape(disc(200, 300, 120, 90, 40)) == "round"
    assert attributes.shape(rectangle(200, 300, (50, 50, 110, 108))) == "square"
    assert attributes.shape(rectangle(200, 300, (50, 50, 200, 80))) == "elongated"
    turned = np.zeros((200, 300), np.uint8)
    cv2.fillPoly(turned, [np.array([[100, 40], [160, 100], [100, 160], [40, 100]])], 1)
    assert attributes.shape(turned.astype(bool)) == "square"
    ell = rectangle(200, 300, (50, 50, 150, 60)) | rectangle(200, 300, (50, 50, 60, 150))
    assert attributes.shape(ell) == "irregular"
    assert attributes.shape(rectangle(200, 300, (50, 50, 130, 100))) is None  # neither square nor elongated
    assert attributes.shape(rectangle(200, 300, (50, 50, 60, 60))) is None  # too small to tell


@pytest.mark.parametrize("side", [40, 90, 95, 98])
def test_a_frame_is_not_round(side: int) -> None:
    """Though the ellipse of its moments covers all of it, for some of these."""
    frame = rectangle(400, 400, (100, 100, 300, 300))
    frame[200 - side // 2 : 200 + side // 2, 200 - side // 2 : 200 + side // 2] = False
    assert attributes.shape(frame) != "round"
    ring = disc(400, 400, 200, 200, 100) & ~disc(400, 400, 200, 200, side / 2)
    assert attributes.shape(ring) is None


def test_texture() -> None:
    image = np.full((128, 128, 3), 120, np.uint8)
    image[:, ::2] = 160
    mask = rectangle(128, 128, (10, 10, 60, 60))
    assert attributes.texture(image, mask) == "textured"
    assert attributes.texture(np.full_like(image, 90), mask) == "plain"
    assert attributes.texture(image, rectangle(128, 128, (0, 0, 2, 3))) is None


def test_relations() -> None:
    one = rectangle(200, 200, (20, 80, 60, 120))
    for x, y, word, reverse in ((120, 80, "left of", "right of"), (20, 150, "above", "below")):
        other = rectangle(200, 200, (x, y, x + 40, y + 40))
        assert attributes.relation(one, other) == word
        assert attributes.relation(other, one) == reverse
    inner, half = rectangle(200, 200, (30, 90, 50, 110)), rectangle(200, 200, (40, 80, 80, 120))
    assert (attributes.relation(inner, one), attributes.relation(one, inner)) == ("inside", "around")
    assert attributes.relation(one, half) == "overlapping"
    assert attributes.relation(one, rectangle(200, 200, (100, 160, 140, 200))) is None  # on the diagonal
    hole = rectangle(200, 200, (10, 70, 70, 130)) & ~one
    assert attributes.relation(one, hole) is None  # surrounded, but not by pixels that it shares


def test_larger_and_same_colour() -> None:
    small, large = rectangle(100, 100, (0, 0, 10, 10)), rectangle(100, 100, (20, 20, 60, 60))
    assert attributes.larger(large, small) is True
    assert attributes.larger(small, large) is False
    assert attributes.larger(small, rectangle(100, 100, (30, 30, 42, 41))) is None
    image = np.zeros((100, 100, 3), np.uint8)
    image[large] = (200, 0, 0)
    assert attributes.same_colour(image, small, large) is False
    assert attributes.same_colour(image, large, rectangle(100, 100, (25, 25, 30, 30))) is True
    image[20:60, 20:40] = (0, 0, 200)
    assert attributes.same_colour(image, small, large) is None


@settings(max_examples=40, deadline=None)
@given(
    x=st.integers(0, 60),
    y=st.integers(0, 40),
    width=st.integers(3, 60),
    height=st.integers(3, 50),
    stretch=st.sampled_from([(2, 1), (1, 3), (2, 2)]),
)
def test_stretching_a_picture_changes_no_size_and_no_position(
    x: int, y: int, width: int, height: int, stretch: tuple[int, int]
) -> None:
    mask = rectangle(100, 128, (x, y, x + width, y + height))
    wide = np.repeat(np.repeat(mask, stretch[1], axis=0), stretch[0], axis=1)
    assert attributes.size(mask) == attributes.size(wide)
    assert attributes.position(mask) == attributes.position(wide)
    assert attributes.box(mask) == pytest.approx(attributes.box(wide))
