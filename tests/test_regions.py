"""Every form of region becomes the mask that its definition says; what is malformed is refused by field."""

import io

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from garserve.errors import RegionError
from garserve.inputs.regions import Region, normalised_box
from garserve.inputs.rle import compressed_runs

H, W = 40, 60


def area(region: Region) -> int:
    return int(region.mask(H, W).sum())


def test_box_covers_the_pixels_it_touches() -> None:
    mask = Region.from_box([10, 5, 20, 9]).mask(H, W)
    assert mask.sum() == 40
    assert mask[5:9, 10:20].all()
    assert area(Region.from_box([10.5, 5.5, 11.5, 6.5])) == 4
    assert np.array_equal(Region.from_xywh([10, 5, 10, 4]).mask(H, W), mask)


def test_box_at_the_edge_is_rounded_and_clipped_on_demand() -> None:
    assert area(Region.from_box([0, 0, W + 0.6, H + 0.9])) == H * W
    with pytest.raises(RegionError, match="outside the 60x40 image; clip=True"):
        area(Region.from_box([50, 30, 70, 50]))
    assert area(Region.from_box([50, 30, 70, 50], clip=True)) == 100


def test_normalised_box_has_inclusive_pixels() -> None:
    mask = Region.from_box([10, 5, 20, 9]).mask(H, W)
    assert normalised_box(mask) == (10 / W, 5 / H, 19 / W, 8 / H)
    assert normalised_box(Region.from_box([3, 4, 4, 5]).mask(H, W)) == (3 / W, 4 / H, 3 / W, 4 / H)


def test_mask_from_array_picture_and_file(tmp_path) -> None:
    mask = np.zeros((H, W), bool)
    mask[3:9, 4:30] = True
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    image.save(tmp_path / "m.png")
    alpha = Image.fromarray(np.dstack([np.full((H, W, 3), 9, np.uint8), mask.astype(np.uint8) * 255]))
    for source in (
        mask,
        mask.astype(np.float32),
        mask[None],
        image,
        tmp_path / "m.png",
        str(tmp_path / "m.png"),
        alpha,
    ):
        assert np.array_equal(Region.from_mask(source).mask(H, W), mask)


def test_polygon_in_all_spellings() -> None:
    points = [[10, 10], [30, 10], [30, 30], [10, 30]]
    flat = [value for point in points for value in point]
    expected = coco.decode(coco.frPyObjects([flat], H, W))[..., 0].astype(bool)
    for spelling in (points, flat, [flat], [points], np.asarray(points), np.asarray(flat)):
        assert np.array_equal(Region.from_polygon(spelling).mask(H, W), expected)
    two = Region.from_polygon([flat, [40, 5, 50, 5, 50, 9]]).mask(H, W)
    assert two.sum() > expected.sum()


def test_points_and_scribble() -> None:
    disc = Region.from_points([30, 20], radius=5).mask(H, W)
    assert abs(int(disc.sum()) - np.pi * 25) < 6
    assert np.array_equal(disc, disc[::-1])
    assert area(Region.from_points([[5, 5], [50, 30]], radius=0.2)) == 2
    assert area(Region.from_points([W, H], radius=0.1)) == 1
    line = Region.from_scribble([[10, 20], [50, 20]], width=6).mask(H, W)
    assert line[17:23, 10:50].all()
    assert line.sum() < 6 * 46
    corner = Region.from_scribble([[10, 10], [30, 10], [30, 30]], width=4).mask(H, W)
    assert corner[9, 20]
    assert corner[20, 29]
    assert not corner[20, 15]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), fill=st.floats(0, 1), height=st.integers(1, 30), width=st.integers(1, 30))
def test_rle_roundtrip(seed: int, fill: float, height: int, width: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < fill
    mask[0, 0] = True
    packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    runs, last, flat = [], False, mask.flatten(order="F")
    start = 0
    for i, value in enumerate([*flat, not flat[-1]]):
        if value != last:
            runs.append(i - start)
            start, last = i, value
    for counts in (packed["counts"], packed["counts"].decode(), runs):
        region = Region.from_rle({"size": [height, width], "counts": counts})
        assert np.array_equal(region.mask(height, width), mask)


def runs_of(counts: bytes | str | list[int]) -> list[int]:
    """The runs of counts; none where they are refused."""
    if isinstance(counts, list):
        return counts if min(counts, default=0) >= 0 else []
    try:
        return compressed_runs(counts)
    except RegionError:
        return []


COCO_TEXT = st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=8)


@settings(max_examples=200, deadline=None)
@given(
    counts=st.one_of(
        st.binary(max_size=30), st.text(max_size=30), COCO_TEXT, st.lists(st.integers(-5, 3000), max_size=8)
    )
)
@example([3, 5, 2])
@example("1114")
@example(b"0T3O")
def test_rle_garbage_is_refused_or_exact(counts: bytes | str | list[int]) -> None:
    """pycocotools itself reads past its buffer on some of these."""
    runs = runs_of(counts)
    if sum(runs) > 100_000:
        runs = []
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)  # outside and inside in turns, down the columns
    for height, width in ((H, W), (1, sum(runs)), (sum(runs), 1)):
        region = Region.from_rle({"size": [height, width], "counts": counts})
        if flat.size == height * width and flat.any():
            assert np.array_equal(region.mask(height, width), flat.reshape(width, height).T)
        else:
            with pytest.raises(RegionError):
                region.mask(height, width)


def test_many_rings_are_drawn_as_coco_draws_them() -> None:
    rng = np.random.default_rng(0)
    starts = rng.integers(0, (90, 60), (41, 2))
    rings = [[int(x), int(y), int(x) + 8, int(y), int(x) + 3, int(y) + 6] for x, y in starts]
    whole = coco.decode(coco.merge(coco.frPyObjects(rings, 70, 100)))
    assert np.array_equal(Region.from_polygon(rings).mask(70, 100), whole)


def test_a_run_of_seven_characters_is_refused() -> None:
    """In COCO's code it overflows and becomes another one: -9 as goooooO is read as -1."""
    with pytest.raises(RegionError, match="not COCO's compressed form at character 10"):
        Region.from_rle({"size": [H, W], "counts": "1111goooooO"}).mask(H, W)


def test_parse() -> None:
    box = Region.from_box([1, 2, 30, 20])
    for data in (box, {"box": [1, 2, 30, 20]}, [1, 2, 30, 20], {"xywh": [1, 2, 29, 18]}, np.array([1, 2, 30, 20])):
        assert np.array_equal(Region.parse(data).mask(H, W), box.mask(H, W))
    packed = coco.encode(np.asfortranarray(box.mask(H, W).astype(np.uint8)))
    assert np.array_equal(Region.parse(packed).mask(H, W), box.mask(H, W))
    assert area(Region.parse({"points": [[5, 5]], "radius": 3})) > 20
    assert area(Region.parse({"scribble": [[5, 5], [9, 9]], "width": 3})) > 5
    assert area(Region.parse({"box": [50, 30, 70, 50], "clip": True})) == 100


def jpeg(grey: np.ndarray) -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(grey.astype(np.uint8)).save(file, "JPEG")
    return Image.open(file)


def test_coordinates_of_the_first_pixel_are_pixels() -> None:
    """Whole ones, and a point by itself, which may be a click."""
    assert area(Region.from_polygon([[0, 0], [1, 0], [1, 1], [0, 1]])) == 1
    assert area(Region.from_polygon([[0.5, 0.5], [0.5, 8], [8, 8]])) > 9
    assert area(Region.from_polygon([[[0.5, 0.5], [0.5, 1], [1, 1]], [[5, 5], [9, 5], [9, 9]]])) > 4
    assert area(Region.from_points([0.5, 0.5], radius=0.1)) == 1
    assert area(Region.from_scribble([[0, 0], [1, 1]], width=1)) >= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_the_mask_only_where_it_leaves_something_out(mode: str) -> None:
    inside = np.zeros((H, W), bool)
    inside[3:9, 4:30] = True
    picture = Image.fromarray(inside.astype(np.uint8) * 255).convert(mode.removesuffix("A") or "L")
    picture = picture.convert("RGB").convert("RGBA") if mode == "RGBA" else picture.convert(mode)
    alpha = np.full((H, W), 255, np.uint8)
    alpha[20, 20] = 254
    picture.putalpha(Image.fromarray(alpha))
    assert picture.mode == mode
    assert (Region.from_mask(picture).mask(H, W) == inside).all()
    alpha[30:] = 0
    picture.putalpha(Image.fromarray(alpha))
    assert (Region.from_mask(picture).mask(H, W) == (alpha > 0)).all()


def test_a_jpeg_s_noise_is_outside(tmp_path) -> None:
    inside = np.zeros((H, W), bool)
    inside[9:11, 9:11] = True
    picture = jpeg(inside * 255)
    assert (np.asarray(picture) > 0).sum() > inside.sum()
    picture.save(tmp_path / "colours.jpg")
    Image.fromarray((inside * 255).astype(np.uint8)).convert("RGB").save(tmp_path / "rgb.jpg")
    for source in (picture, tmp_path / "colours.jpg", tmp_path / "rgb.jpg"):
        assert (Region.from_mask(source).mask(H, W) == inside).all()
    faint = Image.fromarray(inside.astype(np.uint8))  # without loss 1 is inside
    assert (Region.from_mask(faint).mask(H, W) == inside).all()


def test_a_mask_s_value(tmp_path) -> None:
    labels = np.arange(H * W, dtype=np.uint8).reshape(H, W) % 9
    picture = Image.fromarray(labels)
    picture.save(tmp_path / "labels.png")
    indices = picture.convert("P")  # whatever their colours are
    indices.putpalette([200, 10, 10] * 9)
    for source in (labels, labels.tolist(), picture, str(tmp_path / "labels.png"), indices):
        assert (Region.parse({"mask": source, "value": 7}).mask(H, W) == (labels == 7)).all()


NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Region.from_mask(np.ones((H, W + 1))), "mask: expected the image's size 60x40 .* got 61x40"),
        (lambda: Region.from_mask(np.zeros((H, W))), "mask: covers no pixel"),
        (lambda: Region.from_mask(np.full((H, W), NAN)), "mask: holds NaN"),
        (lambda: Region.from_mask(np.zeros((H, W, 2))), "mask: expected numbers or booleans of shape"),
        (lambda: Region.from_mask(Image.new("RGB", (W, H), "red")), "mask: expected a grey"),
        (lambda: Region.from_mask([[1, 0], [1]]), r"mask: expected numbers .* \[H, W\], got \[\[1, 0\], \[1\]\]"),  # type: ignore[arg-type]
        (lambda: Region.from_mask(np.ones((H, W)), value=7), "mask: covers no pixel"),
        (lambda: Region.from_mask(Image.new("RGB", (W, H)), value=0), "mask: value: expected a grey .* got mode RGB"),
        (lambda: Region.from_mask(jpeg(np.full((H, W), 255)), value=255), "mask: value: .* such as PNG, got JPEG"),
        (lambda: Region.parse({"mask": "a.png", "value": "7"}), "mask: value: expected a number, got '7'"),
        (lambda: Region.parse({"mask": "a.png", "index": 7}), "mask has no field 'index'; it takes .'value'."),
        (lambda: Region.from_mask("/nowhere.png"), "mask: /nowhere.png: no such file"),
        (lambda: Region.from_box([70, 5, 80, 9]), "outside the 60x40 image"),
        (lambda: Region.from_box([-30, 5, -10, 9], clip=True), "outside the 60x40 image"),
        (lambda: Region.from_box([20, 5, 10, 9]), "box: expected x1 < x2"),
        (lambda: Region.from_box([10, 5, 10, 9]), "box: expected x1 < x2"),
        (lambda: Region.from_box([NAN, 5, 10, 9]), "box: expected finite numbers"),
        (lambda: Region.from_box([0, 5, float("inf"), 9], clip=True), "box: expected finite numbers"),
        (lambda: Region.from_box([1, 2, 3]), "box: expected 4 numbers, got 3"),
        (lambda: Region.from_box("abcd"), "box: expected numbers"),
        (lambda: Region.from_box("1234"), "box: expected numbers"),
        (lambda: Region.from_box(["1", "2", "3", "4"]), "box: expected numbers"),
        (lambda: Region.from_box([0, 0, True, 9]), "box: expected numbers"),
        (lambda: Region.from_box([0.1, 0.2, 0.5, 0.6]), "box: expected pixels, got .* which look like fractions"),
        (lambda: Region.from_polygon([[0.1, 0.1], [0.5, 0.1], [0.5, 1]]), "polygon: expected pixels, got .* fractions"),
        (
            lambda: Region.from_polygon([[0, 0, 1, 0, 1, 1], [0.1, 0, 0.5, 0, 1, 1]]),
            "polygon: expected pixels, .* ...]",
        ),
        (
            lambda: Region.from_points([[0.25, 0.5], [0.75, 0.5]]),
            "points: expected pixels, got .0.25, 0.5, .* fractions",
        ),
        (lambda: Region.from_scribble([[0.25, 0.5], [1, 1]]), "scribble: expected pixels, got .* look like fractions"),
        (lambda: Region.from_xywh([1, 2, -3, 4]), "box: expected x1 < x2"),
        (lambda: Region.from_polygon([[1, 1], [5, 5]]), "polygon: expected at least three points, got 2"),
        (lambda: Region.from_polygon([1, 1, 5, 5, 9]), "polygon: expected at least three points"),
        (lambda: Region.from_polygon([]), "polygon: expected"),
        (lambda: Region.from_polygon([[1, 1], [NAN, 5], [9, 9]]), "polygon: expected finite numbers"),
        (lambda: Region.from_polygon({"x": 1}), "polygon: expected"),  # type: ignore[arg-type]
        (lambda: Region.from_polygon([{"x": 1, "y": 2, "z": 3}]), "polygon: expected"),
        (lambda: Region.from_polygon(np.array(3)), "polygon: expected"),  # type: ignore[arg-type]
        (lambda: Region.from_polygon([[100, 1], [150, 5], [120, 9]]), "polygon: spans .* outside"),
        (lambda: Region.from_polygon([[1, 1], [1, 1], [1, 1]]), "polygon: covers no pixel"),
        (lambda: Region.from_rle({"size": [W, H], "counts": [0, H * W]}), r"rle: size: expected .* \[40, 60\]"),
        (
            lambda: Region.from_rle({"size": [H, W], "counts": [0, 7]}),
            "rle: counts: expected runs of 2400 pixels in all, got 7",
        ),
        (lambda: Region.from_rle({"size": [H, W], "counts": "0T3"}), "rle: counts: expected runs of 2400"),
        (lambda: Region.from_rle({"size": [H, W], "counts": "\x01"}), "rle: counts: not COCO's compressed form"),
        (lambda: Region.from_rle({"size": [H, W], "counts": "P;é"}), "rle: counts: not COCO's compressed form at .* 2"),
        (lambda: Region.from_rle({"size": [H, W], "counts": [2400]}), "rle: covers no pixel"),
        (
            lambda: Region.from_rle({"size": [H, W], "counts": [1, -1, 2400]}),
            "rle: counts: expected runs of 0 to 2400 pixels, got fewer at position 1",
        ),
        (  # numbers that Python reads, and whose sum it does not write
            lambda: Region.from_rle({"size": [H, W], "counts": [int("9" * 4300)] * 2}),
            "rle: counts: expected runs of 0 to 2400 pixels, got more at position 0$",
        ),
        (lambda: Region.from_rle({"size": [H, W], "counts": [-(10**5000)]}), "rle: counts: .* got fewer"),
        (lambda: Region.from_rle({"size": [H, W], "counts": [2400, 2400]}), "runs of 2400 pixels in all, got 4800"),
        (lambda: Region.from_rle({"size": [H, W]}), "rle: expected"),
        (lambda: Region.from_points([]), "points: expected at least one point"),
        (lambda: Region.from_points([[100, 5]]), r"points: \[100, 5\] lies outside"),
        (lambda: Region.from_points([[1, 2, 3]]), "points: expected 2 numbers, got 3"),
        (lambda: Region.from_points([5, 5], radius=0), "points: expected a radius of more than 0"),
        (lambda: Region.from_points([5, 5], radius=NAN), "points: expected a radius"),
        (lambda: Region.from_points([5, 5], radius="8"), "points: radius: expected a number, got '8'"),
        (lambda: Region.from_points({"x": 1, "y": 2}), "points: expected"),
        (lambda: Region.from_points(np.array(3)), "points: expected"),
        (lambda: Region.from_scribble([[5, 5], [9, 9]], width="8"), "scribble: width: expected a number, got '8'"),
        (lambda: Region.from_scribble([[5, 5]]), "scribble: expected at least two points"),
        (lambda: Region.parse({"box": [1, 2, 3, 4], "rle": {}}), "exactly one of"),
        (lambda: Region.parse({"bbox": [1, 2, 3, 4]}), "exactly one of"),
        (lambda: Region.parse({"box": [1, 2, 3, 4], "radius": 3}), "box has no field 'radius'"),
        (lambda: Region.parse({"points": [[1, 2]], "radius": "3"}), "points: radius: expected a number"),
        (lambda: Region.parse("box"), "region: expected"),
        (lambda: Region.parse(None), "region: expected"),
    ],
)
def test_refused(make, message: str) -> None:
    with pytest.raises(RegionError, match=message):
        make().mask(H, W)


def paletted(colours: list[list[int]], transparent: int | None = None) -> Image.Image:
    """A picture [40, 60] of entries 0, 1, …, one to a block of ten columns."""
    picture = Image.fromarray(np.repeat(np.arange(W, dtype=np.uint8) // 10 % len(colours), 1)[None].repeat(H, 0))
    picture = picture.convert("P")
    picture.putpalette([value for colour in colours for value in colour])
    if transparent is not None:
        picture.info["transparency"] = transparent
    return picture


@pytest.mark.parametrize(
    ("colours", "transparent", "inside"),
    [
        ([[0, 0, 0], [128, 0, 0], [0, 0, 0]], None, {1, 2}),  # labels: entry 0 is outside, whatever others look like
        ([[255, 255, 255], [0, 0, 0]], None, {0}),  # as a quantiser orders black and white
        ([[255, 255, 255], [255, 0, 0]], None, {1}),  # no black: entry 0 is outside
        ([[255, 255, 255], [255, 0, 0], [0, 0, 0]], None, {0, 1}),
        ([[255, 0, 0], [0, 0, 0]], 1, {0}),
        ([[0, 0, 0], [255, 0, 0]], 1, {0}),
    ],
)
def test_palettes(colours: list[list[int]], transparent: int | None, inside: set[int]) -> None:
    expected = np.isin(np.arange(W) // 10 % len(colours), list(inside))[None].repeat(H, 0)
    assert (Region.from_mask(paletted(colours, transparent)).mask(H, W) == expected).all()


def test_a_large_stroke_is_drawn_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    region = Region.from_scribble([[5, 3], [50, 30], [20, 38]], width=21)
    whole = region.mask(H, W)
    monkeypatch.setattr("garserve.inputs.shapes._STROKE_BLOCK", 100)
    assert (region.mask(H, W) == whole).all()
