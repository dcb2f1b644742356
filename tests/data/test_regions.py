import cv2
import numpy as np
import pytest

from d2ssl.data.regions import (
    attach_regions,
    grid_regions,
    kmeans_regions,
    regions_in_view,
    superpixels,
)
from d2ssl.data.views import View, draw_view, window_of

COLOURS = np.array(
    [[30, 160, 40], [220, 30, 30], [30, 60, 220], [240, 220, 60], [250, 250, 250]], np.uint8
)


def drawing(height=96, width=128):
    """Five things of one colour each, and which pixel belongs to which."""
    things = np.zeros((height, width), np.uint8)
    things[: height // 3, : width // 2] = 4
    cv2.circle(things, (width // 4, height * 2 // 3), height // 5, 1, -1)
    cv2.circle(things, (width * 3 // 4, height // 3), height // 4, 2, -1)
    things[height * 3 // 4 :, width * 5 // 8 :] = 3
    return COLOURS[things], things


def purity(labels, things):
    """Share of the pixels that show the thing which their region mostly shows."""
    table = np.zeros((256, 256), int)
    np.add.at(table, (labels.ravel(), things.ravel()), 1)
    return table.max(1).sum() / labels.size


def photo_of(path):
    """A photo as attach_regions reads it: larger than a map, another for each name."""
    number = int(path[-5])
    image, _ = drawing(192, 256)
    image[20:60, 20 + 10 * number : 60 + 10 * number] = COLOURS[3]
    return image


def unreadable(path):
    raise AssertionError(f"{path} was decoded")


DICTS = [
    {"file_name": f"/photos/{i}.jpg", "image_id": i, "height": 192, "width": 256} for i in range(3)
]


@pytest.mark.parametrize(
    "height, width, num, expected",
    [(300, 400, 16, (3, 5)), (400, 300, 16, (5, 3)), (50, 50, 4, (2, 2)), (9, 400, 6, (1, 6)),
     (400, 9, 6, (6, 1)), (10, 10, 1, (1, 1)), (100, 100, 256, (16, 16))],
)  # fmt: skip
def test_grid_is_of_about_square_parts(height, width, num, expected):
    regions = grid_regions(height, width, num)
    assert regions.shape == expected and regions.dtype == np.uint8
    assert sorted(regions.ravel()) == list(range(regions.size)) and regions.size <= num


@pytest.mark.parametrize("find", [superpixels, kmeans_regions])
@pytest.mark.parametrize("num", [5, 16])
def test_a_region_shows_one_thing(find, num):
    image, things = drawing()
    labels = find(image, num)
    assert labels.shape == things.shape and labels.dtype == np.uint8
    assert set(np.unique(labels)) == set(range(labels.max() + 1)) and labels.max() < num
    # k-means of few clusters also divides what is wide.
    assert purity(labels, things) > (0.85 if find is kmeans_regions and num == 5 else 0.97)
    grid = cv2.resize(grid_regions(96, 128, num), (128, 96), interpolation=cv2.INTER_NEAREST)
    assert purity(labels, things) > purity(grid, things) + 0.05


def test_superpixels_are_the_things_where_there_is_one_region_for_each():
    image, things = drawing()
    labels = superpixels(image, 5)
    assert labels.max() == 4 and purity(things, labels) > 0.97


def strips(*parts):
    """Strips side by side, each (width, colour), 40 px high."""
    return np.concatenate([np.full((40, w, 3), c, np.uint8) for w, c in parts], axis=1)


def test_the_smallest_region_joins_its_most_similar_neighbour():
    blue, dark_blue, red = (0, 0, 250), (0, 0, 130), (250, 0, 0)
    # The middle strip is nearer in colour to one side, the left or the right.
    labels = superpixels(strips((50, blue), (20, dark_blue), (50, red)), 2)
    assert labels[20, 60] == labels[20, 10] != labels[20, 110]
    labels = superpixels(strips((50, red), (20, dark_blue), (50, blue)), 2)
    assert labels[20, 60] == labels[20, 110] != labels[20, 10]
    # The two blues are the most similar pair, but the red strip is the smallest.
    labels = superpixels(strips((50, blue), (50, dark_blue), (10, red)), 2)
    assert labels[20, 105] == labels[20, 80] != labels[20, 10]


def test_kmeans_divides_a_blank_photo_by_place_and_is_not_random():
    labels = kmeans_regions(np.full((60, 60, 3), 90, np.uint8), 4)
    quarters = [labels[y : y + 30, x : x + 30] for y in (0, 30) for x in (0, 30)]
    assert all((q == q[0, 0]).all() for q in quarters) and len({q[0, 0] for q in quarters}) == 4
    image, _ = drawing()
    drawn = []
    for seed in (1, 2):
        cv2.setRNGSeed(seed)
        drawn.append(kmeans_regions(image, 16))
    assert np.array_equal(*drawn)


@pytest.mark.parametrize("find", [superpixels, kmeans_regions])
@pytest.mark.parametrize("shape", [(90, 128), (1, 50), (3, 2), (1, 1)])
def test_odd_sizes_and_noise_keep_to_the_number(find, shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for num in (1, 7, 256):
        labels = find(noise, num)
        assert labels.shape == shape and labels.max() < num
        assert len(np.unique(labels)) == int(labels.max()) + 1


@pytest.mark.parametrize("source", ["superpixels", "kmeans", "grid"])
def test_attach_adds_maps_to_copies_in_any_number_of_processes(source):
    before = [dict(d) for d in DICTS]
    alone = attach_regions(DICTS, source, 12, photo_of, num_workers=0)
    shared = attach_regions(DICTS, source, 12, photo_of, num_workers=2)
    assert DICTS == before
    for old, new, again in zip(DICTS, alone, shared):
        regions = new.pop("regions")
        assert new == old and np.array_equal(regions, again["regions"])
        assert regions.dtype == np.uint8 and max(regions.shape) <= 128 and regions.max() < 12
        if source != "grid":
            assert regions.shape == (96, 128)
            own = cv2.resize(photo_of(old["file_name"]), (128, 96), interpolation=cv2.INTER_AREA)
            assert purity(regions, own[..., 0]) > 0.8
    assert source == "grid" or not np.array_equal(shared[0]["regions"], shared[2]["regions"])


def test_grid_reads_no_photo():
    (one,) = attach_regions([{**DICTS[0], "height": 512}], "grid", 8, unreadable)
    assert one["regions"].shape == (4, 2)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_labels_of_a_view_are_what_its_cells_show(flip):
    """A photo in a map's own colours: each cell of one colour tells its label."""
    regions = np.arange(48, dtype=np.uint8).reshape(6, 8)
    photo = cv2.resize(regions, (320, 180), interpolation=cv2.INTER_NEAREST)[..., None] * 5
    photo = photo.repeat(3, axis=2)
    view = View(96, (0.3, 0.9), flip=flip, jitter_p=0, gray=0, blur_p=0, solarize_p=0)
    for seed in range(5):
        np.random.seed(seed)
        image, transforms = draw_view(view, photo)
        labels = regions_in_view(regions, window_of(transforms, 96), photo.shape, 24)
        assert labels.shape == (24, 24) and labels.dtype == np.int64
        cells = image[..., 0].reshape(24, 4, 24, 4).swapaxes(1, 2).reshape(24, 24, 16)
        plain = np.ptp(cells, axis=2) == 0
        assert plain.mean() > 0.4 and len(np.unique(labels)) > 12
        assert (labels[plain] * 5 == cells[plain][:, 0]).all()
        # Where a border runs through a cell, its centre shows one of the two sides.
        assert ((labels * 5 >= cells.min(2)) & (labels * 5 <= cells.max(2))).all()
