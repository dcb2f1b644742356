import tracemalloc

import numpy as np
import pytest
from PIL import Image

from d2ssl.data.datasets.files import Notes
from d2ssl.data.datasets.outlines import (
    as_points,
    check_size,
    clip,
    crosses_itself,
    on_photo,
    outline_annotation,
)
from d2ssl.data.masks import annotation_mask
from d2ssl.errors import D2SSLError

WIDTH, HEIGHT = 60, 40
RECORD = {"file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}


@pytest.fixture
def notes():
    return Notes("labels.json")


def mask(*outlines, width=WIDTH):
    outlines = [np.array(outline, dtype=float) for outline in outlines]
    return annotation_mask(outline_annotation(outlines, 0), HEIGHT, width)


def test_points():
    assert as_points([[1, 2], [3.5, 4]]).dtype == np.float64
    assert as_points([]).shape == (0, 2)
    for damaged in (None, "text", [1, 2], [[1, 2, 3]], [[1], [2, 3]], [["1", "2"]]):
        with pytest.raises(D2SSLError, match="not pairs of numbers"):
            as_points(damaged)
    with pytest.raises(D2SSLError, match="not finite"):
        as_points([[1, float("nan")]])


def test_an_instance_of_two_outlines():
    outlines = [np.array([[5, 5], [10, 5], [10, 9], [5, 9]]), np.array([[20, 3], [25, 3], [25, 7]])]
    annotation = outline_annotation(outlines, 2, shift=0.5)
    assert annotation["bbox"] == [5, 3, 25, 9] and annotation["category_id"] == 2
    assert annotation["segmentation"][1] == [20.5, 3.5, 25.5, 3.5, 25.5, 7.5]
    assert len(annotation["segmentation"]) == 2
    assert mask(*outlines).sum() == pytest.approx(5 * 4 + 4 * 5 / 2, abs=3)


def test_clipping_leaves_the_mask_on_the_photo_as_it_was():
    # A triangle whose tip lies off the photo: moving the tip to the edge would bend its sides.
    points = np.array([[40, 5], [64, 20], [40, 35]])
    expected = mask(points, width=WIDTH + 20)[:, :WIDTH]
    clipped = clip(points, HEIGHT, WIDTH)
    assert (mask(clipped) ^ expected).sum() <= 2  # rounding at the cut
    assert expected.sum() == pytest.approx(24 * 30 / 2 - 4 * 5 / 2, rel=0.05)
    # The other three edges.
    turned = np.array([WIDTH, HEIGHT]) - points
    turned_clipped = [WIDTH, HEIGHT] - clipped
    np.testing.assert_allclose(clip(turned, HEIGHT, WIDTH), turned_clipped)
    for outline, expected in ((points, clipped), (turned, turned_clipped)):
        np.testing.assert_allclose(clip(outline[:, ::-1], WIDTH, HEIGHT), expected[:, ::-1])


@pytest.mark.parametrize("may_leave", [False, True])
@pytest.mark.parametrize(
    "points",
    [[[70, 5], [80, 5], [80, 15]], [[1, -9], [9, -9], [9, 0]], [[-9, 1], [-2, 1], [-2, 9]]],
)
def test_outline_wholly_off_the_photo_is_refused(notes, points, may_leave):
    with pytest.raises(D2SSLError, match="lies wholly off the photo of 60x40"):
        on_photo(as_points(points), RECORD, notes, "a", may_leave)


@pytest.mark.parametrize("excess, long_side, refused", [(5, 60, 0), (6, 60, 1), (9, 1000, 0)])
def test_slip_of_the_hand(notes, excess, long_side, refused):
    record = {**RECORD, "width": long_side}
    points = as_points([[5, 5], [long_side + excess, 5], [long_side + excess, 30], [5, 30]])
    if refused:
        with pytest.raises(D2SSLError, match=r"leaves the photo of 60x40 by 6 pixels.*resized"):
            on_photo(points, record, notes, "a")
    clipped = on_photo(points, record, notes, "a", may_leave=bool(refused))
    assert clipped.max(axis=0).tolist() == [long_side, 30]
    assert [*notes.cases.values()] == [["a"]] and "clipped" in [*notes.cases][0]


def test_hint_at_a_rotated_photo(notes):
    points = as_points([[5, 5], [30, 5], [30, 55]])
    with pytest.raises(D2SSLError, match=r"leaves .*would fit a photo of 40x60: is a.jpg rotated"):
        on_photo(points, RECORD, notes, "a")
    with pytest.raises(D2SSLError, match=r"annotated\?$"):  # would fit neither
        on_photo(points * 2, RECORD, notes, "a")


@pytest.mark.parametrize(
    "points", [[], [[3, 4], [9, 9]], [[3, 4], [9, 8], [15, 12]], [[3, 4], [3, 4], [3, 4]]]
)
def test_what_encloses_no_area_is_dropped(notes, points):
    assert on_photo(as_points(points), RECORD, notes, "a") is None
    assert [*notes.cases] == ["outlines enclose no area and are dropped"]


def test_outline_with_no_area_on_the_photo_is_refused(notes):
    points = as_points([[59.9, 5], [64, 5], [64, 9]])
    with pytest.raises(D2SSLError, match="no area on the photo of 60x40"):
        on_photo(points, RECORD, notes, "a")


def test_self_crossing_outline_is_kept_counted_and_even_odd(notes):
    bow = as_points([[10, 5], [50, 35], [50, 5], [10, 35]])
    # Runs around the outer square, then around the inner one in the same sense.
    twice = np.array([[5, 35, 35, 5, 5, 10, 30, 30, 10, 4], [2, 2, 32, 32, 7, 7, 7, 27, 27, 6]]).T
    for outline in (bow, twice):
        assert on_photo(outline, RECORD, notes, "a") is outline
    bow, ring = mask(bow), mask(twice)
    assert bow[20, 13] and bow[20, 47] and not bow[8, 30]
    assert not ring[20, 20] and ring[30, 20]  # the hole that is warned of
    assert [len(cases) for cases in notes.cases.values()] == [2]


@pytest.mark.parametrize(
    "points",
    [
        [[10, 5], [20, 5], [20, 15], [10, 15], [10, 5]],  # closed
        [[5, 9], [15, 3], [25, 9], [15, 9]],  # touches
    ],
)
def test_closed_and_touching_outlines_do_not_cross(points):
    assert not crosses_itself(np.array(points))


def test_outline_of_many_points_takes_little_memory():
    angle = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    tracemalloc.start()
    assert not crosses_itself(ring)
    assert tracemalloc.get_traced_memory()[1] < 30e6  # of all pairs at once: over 100 MB
    tracemalloc.stop()
    for first, second in ((1998, 1999), (63, 64), (10, 1500)):  # in one block, across, far apart
        crossed = ring.copy()
        crossed[[first, second]] = ring[[second, first]]
        assert crosses_itself(crossed)


def test_size_of_the_photo(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # 60x40 is shown as 40x60
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "plain.jpg")
    turned, plain = str(tmp_path / "turned.jpg"), str(tmp_path / "plain.jpg")
    assert check_size(plain, 40, 60) == check_size(plain, None, None) == (40, 60)
    assert check_size(turned, 60, 40) == check_size(turned, 60, None) == (60, 40)
    with pytest.raises(D2SSLError, match=r"is 40x60, .* for 60x40; .*turned.jpg rotated by EXIF"):
        check_size(turned, 40, 60)
    with pytest.raises(D2SSLError, match=r"is 60x40, .* for 120x80; restore .*annotated$"):
        check_size(plain, 80, 120)
