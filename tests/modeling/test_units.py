"""Rows and their matches, against loops written from the definitions, and on drawn photos."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from d2ssl.config import pretrain_cfg
from d2ssl.data.loader import PhotoStream
from d2ssl.data.mapper import PretextMapper
from d2ssl.data.views import View
from d2ssl.errors import D2SSLError
from d2ssl.modeling.pretext_model import PretextModel, ViewBatch
from d2ssl.modeling.trunk import Trunk
from d2ssl.modeling.units import Boxes, Cells, NearestCells, Regions, WholeImage, level_channels

FPN = {f"p{i}": 6 for i in (2, 3, 4, 5)}


def view_of(size, windows=None, **more):
    windows = torch.zeros(2, 4) if windows is None else torch.tensor(windows, dtype=torch.float32)
    photos = torch.arange(len(windows))
    pixels = torch.zeros(len(windows), 3, size, size)
    return SimpleNamespace(pixels=pixels, windows=windows, photos=photos, **more)


def pyramid_of(maps):
    return SimpleNamespace(pyramid=maps)


def random_maps(channels, size, count=2):
    generator = torch.Generator().manual_seed(0)
    return {
        level: torch.randn(count, dim, *[size >> int(level[-1])] * 2, generator=generator)
        for level, dim in channels.items()
    }


# Where cells lie and which are the same.


def centres_and_diagonals(window, sides):
    """All cells of a view of one photo, float64: [(level, x, y, diagonal)]."""
    left, top, right, bottom = (float(v) for v in window)
    return [
        (n, left + (right - left) * (j + 0.5) / side, top + (bottom - top) * (i + 0.5) / side,
         np.hypot((right - left) / side, (bottom - top) / side))
        for n, side in enumerate(sides) for i in range(side) for j in range(side)
    ]  # fmt: skip


def random_windows(rng, count, flips):
    corner, extent = rng.uniform(0, 90, (count, 2)), rng.uniform(30, 90, (count, 2))
    windows = np.concatenate([corner, corner + extent], axis=1)
    for i in range(count):
        if flips[i % len(flips)]:
            windows[i, [0, 2]] = windows[i, [2, 0]]
    return windows


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize(
    "levels, grid, sides", [("p3 p5", 5, (5, 2)), ("p4", 14, (4,)), ("res5", 14, (2,))]
)
def test_cells_equal_the_definition_in_loops(levels, grid, sides, nearest):
    rng, radius = np.random.default_rng(0), 0.6
    windows = [random_windows(rng, 4, flips) for flips in ((False, True), (False, False, True))]
    cells = (NearestCells if nearest else Cells)(
        {level: 8 for level in levels.split()}, grid, radius
    )
    same, different = cells.compare(*(view_of(64, w) for w in windows))
    for photo in range(4):
        here, there = (centres_and_diagonals(w[photo], sides) for w in windows)
        assert same.shape[1:] == (len(here), len(there))
        for i, (level, x, y, diagonal) in enumerate(here):
            share = [
                np.hypot(x - u, y - v) / max(diagonal, other) if level == n else np.inf
                for n, u, v, other in there
            ]
            assert np.abs(np.subtract(share, radius)).min() > 1e-5  # fp32 cannot turn the answer
            close = [s < radius and (not nearest or s == min(share)) for s in share]
            assert same[photo, i].tolist() == close
            assert different[photo, i].tolist() == [s > 1 for s in share]
    assert same.any() and different.any()


def test_a_cell_is_its_own_match_far_from_the_origin():
    """fp32: at 4000 px a distance by way of squares would be off by pixels."""
    window = [[3600.1, 3700.7, 3824.3, 3924.9]]
    for kind in (Cells, NearestCells):
        same, _ = kind(FPN, 14, 0.02).compare(view_of(224, window), view_of(224, window))
        assert (same[0] == torch.eye(same.shape[1], dtype=torch.bool)).all()


def test_within_the_radius_only_the_nearest():
    """Cells of 8 px and their diagonal 11.3; b lies 3 px to the right, so the next are 5 px off."""
    views = [view_of(64, [[x, 0, x + 64, 64]]) for x in (0, 3)]
    cells = (kind({"p3": 8}, 14, 0.45) for kind in (Cells, NearestCells))
    wide, one = (kind.compare(*views)[0][0].view(8, 8, 8, 8) for kind in cells)
    assert wide[2, 4].nonzero().tolist() == [[2, 3], [2, 4]]
    assert one[2, 4].nonzero().tolist() == [[2, 4]]


def test_a_flipped_view_matches_its_mirror_image():
    a, b = view_of(64, [[10, 20, 74, 84]]), view_of(64, [[74, 20, 10, 84]])
    same, _ = Cells({"p4": 8}, 14, 0.1).compare(a, b)
    i, j, k, m = same[0].view(4, 4, 4, 4).nonzero().unbind(1)
    assert len(i) == 16 and (i == k).all() and (j == 3 - m).all()


@pytest.mark.parametrize("size", [64, 96, 128, 160, 192, 224])
@pytest.mark.parametrize("levels", [("p2", "p3", "p4", "p5"), ("res5",), ("p5", "p2")])
def test_rows_look_where_their_lattice_says(tiny_cfg, size, levels):
    """Maps that hold their cells' own places: after averaging to the grid, each row holds its own.

    Where the grid does not divide a map, cells of the average overlap and lie off by up to half a
    cell of the map.
    """
    windows = np.array([[10, 20, 10 + size, 20 + size / 2], [200, 50, 60, 190]])
    maps = {}
    for level in levels:
        side = size >> int(level[-1])
        places = [[c[1:3] for c in centres_and_diagonals(w, [side])] for w in windows]
        maps[level] = torch.tensor(places).view(2, side, side, 2).permute(0, 3, 1, 2).float()
    cells, view = Cells({level: 2 for level in levels}, 14, 0.7), view_of(size, windows)
    rows, lattice = cells.rows(pyramid_of(maps), view), cells.lattice(view)
    cfg = tiny_cfg("SSL.INPUT.VIEW_SIZE", str(size), "SSL.LEVELS", str(list(levels)))
    assert rows.shape == (2, cells.count(cfg), 2)
    off = (rows - lattice.centres).abs()  # N x R x 2
    for number, level in enumerate(levels):
        side = size >> int(level[-1])
        exact = side <= 14 or side % 14 == 0
        cell = torch.tensor(np.abs(windows[:, 2:] - windows[:, :2]) / side)[:, None]
        assert (off[:, lattice.level == number] <= (1e-3 if exact else 0.5) * cell + 1e-3).all()


def test_cells_are_averaged_down_to_the_grid():
    maps = random_maps({"p3": 5, "p5": 5}, 64)  # 8 and 2 cells a side
    rows = Cells({"p3": 5, "p5": 5}, 4, 0.7).rows(pyramid_of(maps), view_of(64))
    assert rows.shape == (2, 16 + 4, 5)
    for n, i, j in itertools.product(range(2), range(4), range(4)):
        block = maps["p3"][n, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].double().numpy()
        assert rows[n, 4 * i + j].numpy() == pytest.approx(block.mean((1, 2)), abs=1e-6)
    for n, i, j in itertools.product(range(2), range(2), range(2)):
        assert (rows[n, 16 + 2 * i + j] == maps["p5"][n, :, i, j]).all()


# The same on photos: what a view shows at a cell's centre says where it looks.

PLAIN = dict(jitter_p=0, gray=0, blur_p=0, solarize_p=0)


def items_of_a_ramp(crop_scale, sizes, count):
    """Views of a 200 x 240 photo whose red is x and whose green is y."""
    y, x = np.mgrid[:200, :240]
    photo = np.dstack([x, y, np.full_like(x, 99)]).astype(np.uint8)
    views = [View(size, crop_scale, **PLAIN) for size in sizes]
    mapper = PretextMapper(
        read_photo=lambda name: photo, views=views, view_pairs=[(0, 1)], needs=frozenset(),
        image_format="BGR", fill=(0, 0, 0), num_boxes=4, min_box_size=4.0, box_jitter=0.0,
        hole_share=0.2, hole_size=0.2,
    )  # fmt: skip
    stream = PhotoStream([{"file_name": "ramp", "image_id": 0}], mapper, seed=0)
    return [stream[position] for position in range(count)]


def batches_of(items):
    model = SimpleNamespace(
        pixel_mean=torch.zeros(3, 1, 1), method=SimpleNamespace(view_pairs=[(0, 1)])
    )
    return [ViewBatch(model, items, index) for index in (0, 1)]


def seen(pixels, side):
    """side x side x 2, the x and y of the photo that a BGR view shows at its cells' centres."""
    xy = pixels.flip(0)[:2].double().numpy()  # 2 x S x S
    step = xy.shape[1] // side
    middle = step // 2 + step * np.arange(side)  # a centre has two pixels on each side
    around = [xy[:, middle - a][:, :, middle - b] for a in (0, 1) for b in (0, 1)]
    return np.moveaxis(np.mean(around, axis=0), 0, 2) + 0.5  # pixel 0 has its centre at 0.5


def cells_seen(view, n, sides):
    """For one photo R x 2 places and R diagonals, as its pixels show them, level by level."""
    places, diagonals = [], []
    for side in sides:
        xy = seen(view.pixels[n], side)
        across = np.linalg.norm(xy[-1, -1] - xy[0, 0]) / (side - 1)
        places.append(xy.reshape(-1, 2)), diagonals.append(np.full(side * side, across))
    return np.concatenate(places), np.concatenate(diagonals)


@pytest.mark.parametrize("nearest", [False, True])
def test_matched_cells_show_the_same_place(nearest):
    """Crops, flips and resizes: matches within the radius, and all that lie well within it.

    Colours are whole numbers, so that places are known to a pixel.
    """
    items = items_of_a_ramp((0.2, 0.8), (128, 96), count=24)
    a, b = batches_of(items)
    for view in (a, b):
        flipped = view.windows[:, 0] > view.windows[:, 2]
        assert 0 < flipped.sum() < len(items)
    cells = (NearestCells if nearest else Cells)({"p3": 4, "p4": 4}, 8, 0.7)
    same, different = cells.compare(a, b)
    level = np.repeat([0, 1], [64, 64]), np.repeat([0, 1], [64, 36])
    for n in range(len(items)):
        (here, diagonal_a), (there, diagonal_b) = (
            cells_seen(view, n, sides) for view, sides in ((a, (8, 8)), (b, (8, 6)))
        )
        distance = np.linalg.norm(here[:, None] - there, axis=2)
        cell = np.maximum(diagonal_a[:, None], diagonal_b)
        one_level = level[0][:, None] == level[1]
        matched = same[n].numpy()
        assert (distance[matched] < 0.7 * cell[matched] + 1.5).all()
        assert one_level[matched].all()
        close = one_level & (distance < 0.7 * cell - 1.5)
        if nearest:
            least = np.where(one_level, distance, np.inf).min(1, keepdims=True)
            assert (matched.sum(1) <= 1).all()
            assert (distance[matched] <= np.broadcast_to(least, distance.shape)[matched] + 2).all()
            assert matched[close.any(1)].any(1).all()
        else:
            assert matched[close].all()
        apart = different[n].numpy() & one_level
        assert (distance[apart] > cell[apart] - 1.5).all()
        assert not (matched & different[n].numpy()).any()
    assert same.any(2).any(1).sum() > 20


def test_views_that_do_not_overlap_match_nowhere():
    items = items_of_a_ramp((0.03, 0.08), (64, 64), count=40)
    a, b = batches_of(items)
    same, different = Cells({"p3": 4, "p4": 4}, 14, 0.7).compare(a, b)
    apart, touching = [], []
    for n in range(len(items)):
        (here, cell), (there, other) = (cells_seen(v, n, (8, 4)) for v in (a, b))
        margin = max(cell.max(), other.max())
        low, high = np.maximum(here.min(0), there.min(0)), np.minimum(here.max(0), there.max(0))
        (apart if (low - high).max() > margin else touching).append(n)
    assert len(apart) > 10 and len(touching) > 3
    assert not same[apart].any() and different[apart].all()
    assert same[touching].any()


# The other kinds.


def test_whole_image_is_the_mean_of_each_level():
    channels = {"p3": 4, "res5": 7}
    maps, view = random_maps(channels, 64), view_of(64)
    units = WholeImage(channels)
    rows = units.rows(pyramid_of(maps), view)
    assert units.dim == 11 and rows.shape == (2, 1, 11) and units.reaches == ("bottom_up", "fpn")
    for n in range(2):
        expected = [maps[m][n, c].double().mean() for m in channels for c in range(channels[m])]
        assert rows[n, 0].numpy() == pytest.approx(np.array(expected), abs=1e-6)
    same, different = units.compare(view, view)
    assert same.tolist() == [[[True]]] * 2 and not different.any()
    assert units.present(view).all()


NUM = 5


def labels_in_blocks(seed):
    """64 px views of two photos: labels that are constant over the cells of P4, none is 3, and one
    P2 cell away from all centres of P4's is 4."""
    labels = np.random.default_rng(seed).choice([0, 1, 2], (2, 4, 4)).repeat(4, 1).repeat(4, 2)
    labels[:, 7, 4] = 4
    return labels


def test_regions_are_plain_means_over_their_cells():
    maps = random_maps({"p2": 3, "p4": 3}, 64)
    labels = labels_in_blocks(0)
    view = view_of(64, regions=torch.tensor(labels))
    units = Regions({"p2": 3, "p4": 3}, NUM)
    rows, present = units.rows(pyramid_of(maps), view), units.present(view)
    assert rows.shape == (2, 2 * NUM, 3) and present.shape == (2, 2 * NUM)
    for n, (row, (level, step)), label in itertools.product(
        range(2), enumerate([("p2", 1), ("p4", 4)]), range(NUM)
    ):
        of_cells = labels[n, ::step, ::step]  # at a corner: blocks are constant
        cells = maps[level][n].double().numpy()[:, of_cells == label]  # C x cells
        assert present[n, row * NUM + label] == (cells.shape[1] > 0)
        if cells.shape[1]:
            expected = cells.mean(1)
            assert rows[n, row * NUM + label].numpy() == pytest.approx(expected, abs=1e-6)
    assert present[:, 4].all() and not present[:, NUM + 4].any()  # P4 cannot see the one cell
    assert not present[:, 3].any()


def test_a_large_cell_has_the_label_of_a_small_one_at_its_centre():
    """Not a label between those of its cells."""
    labels = 4 * torch.randint(0, 2, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    units, view = Regions({"p3": 3, "p4": 3, "p5": 3}, NUM), view_of(64, regions=labels)
    present = units.present(view).view(2, 3, NUM)
    assert present[:, :, [0, 4]].any(2).all() and not present[:, :, 1:4].any()
    for n, i, j in itertools.product(range(2), range(4), range(4)):
        maps = {level: torch.zeros(2, 3, 64 >> int(level[1]), 64 >> int(level[1])) for level in FPN}
        maps["p4"][n, :, i, j] = 1
        shown = units.rows(pyramid_of(maps), view)[n, :, 0] * units.present(view)[n]
        label = shown.nonzero().item() - NUM
        assert label in labels[n, 4 * i + 1 : 4 * i + 3, 4 * j + 1 : 4 * j + 3]


def test_regions_are_the_same_by_label_and_absent_ones_are_neither():
    views = [view_of(64, regions=torch.tensor(labels_in_blocks(seed))) for seed in (0, 1)]
    views[1].regions[0][views[1].regions[0] == 2] = 0  # the second view does not show region 2
    units = Regions({"p2": 3, "p4": 3}, NUM)
    same, different = units.compare(*views)
    here, there = (units.present(view) for view in views)
    assert here[0, 2] and not there[0, 2]
    for n, i, j in itertools.product(range(2), range(2 * NUM), range(2 * NUM)):
        both, one_level = here[n, i] and there[n, j], i // NUM == j // NUM
        assert same[n, i, j] == (both and i == j)
        assert different[n, i, j] == (both and one_level and i % NUM != j % NUM)
    assert not (same | different)[0, :, 2].any()


def test_boxes_are_the_same_by_proposal():
    ids = (
        torch.tensor([[7, 3, -1, 7], [-1, -1, 2, 4]]),
        torch.tensor([[3, 7, -1, 9], [2, -1, 5, 2]]),
    )
    same, different = Boxes(8).compare(*(SimpleNamespace(box_ids=i) for i in ids))
    for n, i, j in itertools.product(range(2), range(4), range(4)):
        a, b = ids[0][n, i].item(), ids[1][n, j].item()
        assert same[n, i, j] == (a == b and a != -1)
        assert different[n, i, j] == (a != b and -1 not in (a, b))


# Levels.


@pytest.fixture
def trunk(tiny_cfg):
    cfg = pretrain_cfg(tiny_cfg())
    return Trunk(cfg)


def test_channels_of_levels(trunk):
    assert level_channels(trunk, ["p3", "res4"]) == {"p3": 32, "res4": 256}
    assert Cells({"res5": 512}, 14, 0.7).reaches == ("bottom_up",)
    assert Regions({"p2": 32}, 4).reaches == ("bottom_up", "fpn")


@pytest.mark.parametrize("name", ["p6", "p7", "res1", "P3", None])
def test_a_level_that_is_not_there_is_named(trunk, name):
    with pytest.raises(D2SSLError) as error:
        level_channels(trunk, ["p2", name] if name else [])
    assert str(error.value) == (
        f"SSL.LEVELS {name or '(none)'}: choose from res2, res3, res4, res5, p2, p3, p4, p5"
    )


@pytest.mark.parametrize("name", ["MoCo", "PLMoCo", "RLMoCo"])
def test_methods_pass_it_on(tiny_cfg, name):
    with pytest.raises(D2SSLError, match="SSL.LEVELS p6: choose from"):
        PretextModel(pretrain_cfg(tiny_cfg("SSL.METHOD", name, "SSL.LEVELS", '["p5", "p6"]')))


@pytest.mark.parametrize("name", ["PLMoCo", "RLMoCo"])
def test_one_head_needs_one_width(tiny_cfg, name):
    with pytest.raises(D2SSLError, match="SSL.LEVELS p2, res5 differ in channels") as error:
        PretextModel(pretrain_cfg(tiny_cfg("SSL.METHOD", name, "SSL.LEVELS", '["p2", "res5"]')))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("name", ["MoCo", "PLMoCo", "RLMoCo"])
def test_res5_alone_leaves_the_fpn_as_it_is(model_and_batch, name, size):
    levels = ["SSL.LEVELS", '["res5"]', "SSL.REGIONS.SOURCE", "grid"]
    model, batch = model_and_batch(name, *levels, "SSL.INPUT.VIEW_SIZE", str(size))
    sum(model(batch).values()).backward()
    learns = {name for name, p in model.trunk.named_parameters() if p.grad is not None}
    assert learns and all(name.startswith("backbone.bottom_up.") for name in learns)
