import random

import cv2
import numpy as np
import pytest
from detectron2.data import transforms as T

from d2ssl.data.loader import random_state
from d2ssl.data.views import (
    RandomResizedCrop,
    ResizeTo,
    View,
    apply_boxes,
    apply_points,
    clip,
    cut_out,
    draw_holes,
    draw_view,
    draw_views,
    paired_boxes,
    photo_side,
    visible_fraction,
    window_of,
)

PLAIN = {"jitter_p": 0.0, "gray": 0.0, "blur_p": 0.0, "solarize_p": 0.0}
WHOLE = View(64, crop_scale=None, flip=0.0, **PLAIN)
VIEWS = [
    WHOLE,
    View(96, crop_scale=None, flip=1.0, **PLAIN),
    View(224, flip=0.0, **PLAIN),
    View(128, crop_scale=(0.3, 0.6), flip=1.0, **PLAIN),
]
HEIGHT, WIDTH = 240, 360


def ramp(height=HEIGHT, width=WIDTH):
    """A photo whose red and green tell the place: x and y of a pixel's centre."""
    y, x = np.indices((height, width)) + 0.5
    return np.stack([x * 255 / width, y * 255 / height, 0 * x], -1).astype(np.uint8)


def place_of(colour):
    """Photo coordinates of a colour of the ramp; the half is lost where it is truncated."""
    return (colour[..., :2].astype(float) + 0.5) * np.array([WIDTH, HEIGHT]) / 255


def some_boxes(rng, n=30):
    corner = rng.uniform(0, [WIDTH - 60, HEIGHT - 60], (n, 2))
    side = rng.uniform(30, 60, (n, 2))
    return np.concatenate([corner, corner + side], 1).astype(np.float32)


@pytest.mark.parametrize("view", VIEWS)
def test_dots_are_found_where_the_transform_says(view):
    rng = np.random.default_rng(0)
    for seed in range(5):
        np.random.seed(seed)
        photo = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
        dot = rng.integers([140, 90], [220, 150])  # the middle, which nearly every crop shows
        photo[dot[1] - 4 : dot[1] + 5, dot[0] - 4 : dot[0] + 5] = 255
        image, transforms = draw_view(view, photo)
        x, y = apply_points(transforms, [dot + 0.5])[0]
        weight = image[..., 0].astype(float)
        rows, columns = np.indices(weight.shape) + 0.5
        found = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
        assert image.shape == (view.size, view.size, 3)
        assert np.abs(found - [x, y]).max() < 1


@pytest.mark.parametrize("view", VIEWS)
def test_view_points_map_back_to_the_photo(view):
    np.random.seed(1)
    image, transforms = draw_view(view, ramp())
    points = np.random.uniform(0.1 * view.size, 0.9 * view.size, (50, 2))
    back = apply_points(transforms.inverse(), points)
    assert np.allclose(apply_points(transforms, back), points)
    seen = place_of(image[points[:, 1].astype(int), points[:, 0].astype(int)])
    pixel = max(WIDTH, HEIGHT) / view.size  # a view pixel in photo pixels
    assert np.abs(seen - back).max() < 1 + pixel


@pytest.mark.parametrize(
    "view",
    [
        View(64, crop_scale=None, flip=1.0, **PLAIN),
        View(256, crop_scale=(0.1, 0.3), flip=0.0, **PLAIN),  # enlarged
        View(96, crop_scale=(0.2, 1.0), ratio=(0.4, 2.5), flip=0.5, **PLAIN),
    ],
)
@pytest.mark.parametrize("level", [4, 32])
def test_window_tells_what_each_cell_of_a_view_shows(view, level):
    """A photo whose red is x and whose green is y; the four pixels around a cell's centre."""
    y, x = np.indices((200, 250))
    photo = np.stack([x, y, 0 * x], -1).astype(np.uint8)
    flips = 0
    for seed in range(12):
        np.random.seed(seed)
        image, transforms = draw_view(view, photo)
        left, top, right, bottom = window = window_of(transforms, view.size)
        assert window.dtype == np.float64 and top < bottom
        flips += left > right
        cells = view.size // level
        steps = (np.arange(cells) + 0.5) / cells
        pixels = image[..., :2].reshape(cells, level, cells, level, 2).astype(float)
        middle = pixels[:, level // 2 - 1 : level // 2 + 1, :, level // 2 - 1 : level // 2 + 1]
        seen = middle.mean((1, 3)) + 0.5  # a pixel's centre
        assert np.abs(seen[..., 0] - (left + (right - left) * steps)).max() < 0.75
        assert np.abs(seen[..., 1] - (top + (bottom - top) * steps)[:, None]).max() < 0.75
    assert flips == 12 * view.flip if view.flip in (0, 1) else 0 < flips < 12


@pytest.mark.parametrize("large", [View(192, flip=0.5, **PLAIN), View(192, None, **PLAIN)])
def test_a_view_of_a_view_shows_the_same_window_at_its_own_size(large):
    small = View(64, crop_scale=(0.1, 0.2), of=1, **PLAIN)
    views = [View(128, **PLAIN), large, small, View(32, of=2, **{**PLAIN, "gray": 1.0})]
    photo = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    photo = cv2.resize(photo, (360, 240), interpolation=cv2.INTER_CUBIC)
    turned = []
    for seed in range(16):
        np.random.seed(seed)
        drawn = draw_views(views, photo)
        windows = [window_of(t, v.size) for (_, t), v in zip(drawn, views)]
        images = [image for image, _ in drawn]
        assert [len(image) for image in images] == [128, 192, 64, 32]
        for i in (2, 3):
            apart = windows[i][0] > windows[i][2], windows[1][0] > windows[1][2]
            turned.append(apart)
            order = [2, 1, 0, 3] if apart[0] != apart[1] else [0, 1, 2, 3]
            assert np.allclose(windows[i][order], windows[1])
        whole = images[1][:, ::-1] if turned[-2][0] != turned[-2][1] else images[1]
        copy = cv2.resize(whole, (64, 64), interpolation=cv2.INTER_AREA)
        assert np.abs(copy.astype(int) - images[2]).mean() < 4
        assert np.ptp(images[3].astype(int), axis=2).max() <= 1 < np.ptp(images[2], axis=2).max()
        assert not np.allclose(windows[0], windows[1], atol=1)
    assert len(set(turned)) == 4  # flips are drawn for each view


def test_least_side_of_the_photo():
    assert photo_side([View(224, crop_scale=None)]) == 224
    soco = [View(224, crop_scale=None), View(224), View(96)]
    assert photo_side(soco) == 317  # 317 * sqrt(1/2) = 224.2
    assert photo_side([*soco, View(96, crop_scale=(0.04, 1.0))]) == 480
    assert photo_side([*soco, View(192, crop_scale=(0.01, 1.0), of=0)]) == 317
    assert photo_side([View(64), View(128, None, of=0), View(256, None, of=1)]) == 363


def test_helpers_agree_with_detectron2_and_leave_their_input():
    boxes = np.array([[10, 20, 90, 100], [0, 0, 360, 240]])  # integers: must not be rounded
    before = boxes.copy()
    for seed, view in enumerate(VIEWS):
        np.random.seed(seed)
        _, transforms = draw_view(view, ramp())
        ours = apply_boxes(transforms, boxes)
        assert np.allclose(ours, transforms.apply_box(boxes.astype(float)))
        assert np.array_equal(boxes, before)
    assert apply_boxes(transforms, np.zeros((0, 4))).shape == (0, 4)
    boxes = np.array([[-10.0, 0, 10, 20], [0, 0, 10, 10], [70, 0, 90, 10], [5, 5, 5, 5]])
    assert clip(boxes, 64).tolist()[0] == [0, 0, 10, 20]
    assert visible_fraction(boxes, 64).tolist() == [0.5, 1, 0, 0]


def test_flip_mirrors_the_view():
    np.random.seed(0)
    plain, _ = draw_view(WHOLE, ramp())
    flipped, transforms = draw_view(View(64, crop_scale=None, flip=1.0, **PLAIN), ramp())
    assert np.array_equal(flipped, plain[:, ::-1])
    assert np.allclose(apply_boxes(transforms, [[0, 0, WIDTH / 4, HEIGHT]]), [[48, 0, 64, 64]])


def test_masks_follow_the_pixels():
    photo = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    photo[60:180, 90:270] = 255
    for seed, view in enumerate(VIEWS):
        np.random.seed(seed)
        image, transforms = draw_view(view, photo)
        mask = transforms.apply_segmentation((photo[..., 0] > 0).astype(np.uint8))
        assert ((image[..., 0] > 127) != mask).mean() < 0.03 and 0.1 < mask.mean()


def test_crops_have_the_stated_area_ratio_and_spread():
    np.random.seed(0)
    crop, photo = RandomResizedCrop(32, (0.3, 0.7), (0.5, 2.0)), ramp()
    drawn = np.array([crop._draw(HEIGHT, WIDTH) for _ in range(3000)])
    x, y, w, h = drawn.T
    area = w * h / (HEIGHT * WIDTH)
    assert 0.29 < area.min() < 0.32 and 0.6 < area.max() < 0.71
    assert 0.49 < (w / h).min() < 0.6 and 1.9 < (w / h).max() < 2.02
    assert (x >= 0).all() and (x + w <= WIDTH).all() and (y + h <= HEIGHT).all()
    assert (x == 0).any() and (x + w == WIDTH).any() and (y + h == HEIGHT).any()
    assert crop.get_transform(photo).apply_image(photo).shape == (32, 32, 3)


@pytest.mark.parametrize("height, width", [(20, 400), (400, 20)])
def test_crops_of_a_strip_are_the_largest_and_lie_anywhere(height, width):
    np.random.seed(0)
    crop = RandomResizedCrop(32, (0.9, 1.0))
    x, y, w, h = np.transpose([crop._draw(height, width) for _ in range(300)])
    assert (np.maximum(w, h) == 27).all() and (np.minimum(w, h) == 20).all()  # 20 * 4/3
    place = np.maximum(x, y)
    assert (np.minimum(x, y) == 0).all() and place.min() < 10 and 363 < place.max() <= 400 - 27
    assert np.histogram(place, 10)[0].min() > 15


def test_whole_photo_is_detectron2s_resize():
    photo = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    expected = T.ResizeTransform(50, 70, 32, 32).apply_image(photo)
    assert np.array_equal(ResizeTo(32).get_transform(photo).apply_image(photo), expected)


def test_same_seed_same_view_other_seed_other_view():
    view, photo = View(64, blur_p=0.5, plane_shift=0.1), ramp()
    drawn = []
    for seed in (3, 3, 4):
        np.random.seed(seed)
        drawn.append(draw_view(view, photo))
    assert np.array_equal(drawn[0][0], drawn[1][0])
    corner = [apply_boxes(t, [[0, 0, WIDTH, HEIGHT]]).tolist() for _, t in drawn]
    assert corner[0] == corner[1] != corner[2]
    assert not np.array_equal(drawn[0][0], drawn[2][0])
    assert photo.tobytes() == ramp().tobytes()
    assert all(image.dtype == np.uint8 and image.flags.c_contiguous for image, _ in drawn)


@pytest.mark.parametrize("name", ["jitter_p", "gray", "blur_p", "solarize_p"])
def test_probabilities_at_their_extremes(name):
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    never = View(64, crop_scale=None, flip=0.0, **PLAIN)
    always = View(64, crop_scale=None, flip=0.0, **{**PLAIN, name: 1.0})
    for seed in range(10):
        np.random.seed(seed)
        assert np.array_equal(draw_view(never, photo)[0], photo)
        assert not np.array_equal(draw_view(always, photo)[0], photo)


def test_flip_and_gray_happen_as_often_as_stated():
    np.random.seed(0)
    view = View(32, crop_scale=None, flip=0.5, **{**PLAIN, "gray": 0.2})
    photo = ramp(32, 32)
    images = [draw_view(view, photo)[0] for _ in range(1000)]
    assert abs(np.mean([(i[..., 0] == i[..., 1]).all() for i in images]) - 0.2) < 0.04
    assert abs(np.mean([i[:, 0].mean() > i[:, -1].mean() for i in images]) - 0.5) < 0.05


def test_plane_shift_is_off_by_default_and_moves_planes_apart():
    photo = np.full((32, 32, 3), 128, dtype=np.uint8)
    np.random.seed(0)
    assert (draw_view(View(32, **PLAIN), photo)[0] == 128).all()
    image = draw_view(View(32, plane_shift=0.2, **PLAIN), photo)[0]
    colour = image[0, 0].astype(int)
    assert (image == image[0, 0]).all() and len(set(colour)) == 3
    assert np.abs(colour - 128).max() <= 51


@pytest.mark.parametrize("a, b", [(0, 2), (0, 3), (2, 3), (1, 2)])
def test_paired_boxes_look_at_the_same_place(a, b):
    rng, photo, pairs = np.random.default_rng(0), ramp(), 0
    for seed in range(10):
        np.random.seed(seed)
        (image_a, move_a), (image_b, move_b) = (draw_view(VIEWS[i], photo) for i in (a, b))
        proposals = some_boxes(rng)
        boxes_a, boxes_b, ids = paired_boxes(
            proposals, move_a, move_b, VIEWS[a].size, VIEWS[b].size, k=6, min_size=8, jitter=0.0
        )
        assert boxes_a.dtype == boxes_b.dtype == np.float32 and ids.dtype == np.int64
        assert boxes_a.shape == boxes_b.shape == (6, 4) and ids.shape == (6,)
        window = [apply_boxes(m.inverse(), [[0, 0, s, s]])[0] for m, s in
                  ((move_a, VIEWS[a].size), (move_b, VIEWS[b].size))]  # fmt: skip
        for box_a, box_b, i in zip(boxes_a, boxes_b, ids):
            for image, box, part in ((image_a, box_a, window[0]), (image_b, box_b, window[1])):
                # What the pixels in the box say: where in the photo its middle lies.
                x1, y1, x2, y2 = np.round(box).astype(int)
                seen = place_of(image[y1:y2, x1:x2]).reshape(-1, 2).mean(0)
                expected = np.concatenate(
                    [np.maximum(proposals[i, :2], part[:2]), np.minimum(proposals[i, 2:], part[2:])]
                )
                pixel = (part[2:] - part[:2]).max() / len(image)
                assert np.abs(seen - (expected[:2] + expected[2:]) / 2).max() < 1 + pixel
                pairs += 1
    assert pairs == 120


def test_boxes_too_small_or_too_far_out_take_no_part():
    # View a is the whole 100x100 photo at 100 px, b its left half at 100 px (x doubled).
    move_a = T.TransformList([T.ResizeTransform(100, 100, 100, 100)])
    move_b = T.TransformList([T.CropTransform(0, 0, 50, 100, 100, 100),
                              T.ResizeTransform(100, 50, 100, 100)])  # fmt: skip
    proposals = np.array(
        [
            [10, 10, 40, 40],  # visible
            [30, 10, 60, 40],  # 2/3 of it in b
            [41, 10, 61, 40],  # 9/20 of it in b
            [60, 10, 90, 40],  # not in b
            [10, 10, 40, 25],  # 15 px high
        ]
    )
    pair = dict(size_a=100, size_b=100, k=8, min_size=16, jitter=0.0)
    boxes_a, boxes_b, ids = paired_boxes(proposals, move_a, move_b, **pair)
    assert set(ids) == {0, 1} and (np.bincount(ids) == 4).all()  # repeated in turn
    assert boxes_a[ids == 1].tolist() == [[30, 10, 60, 40]] * 4
    assert boxes_b[ids == 1].tolist() == [[60, 10, 100, 40]] * 4
    more = paired_boxes(proposals, move_a, move_b, **{**pair, "min_size": 15}, min_visible=0.4)
    assert set(more[2]) == {0, 1, 2, 4}


def test_choice_is_without_replacement_uniform_and_seeded():
    move = T.TransformList([T.NoOpTransform()])
    proposals = np.array([[10 * i, 0, 10 * i + 30, 30] for i in range(6)])
    np.random.seed(0)
    chosen = [paired_boxes(proposals, move, move, 100, 100, k=3)[2] for _ in range(2000)]
    assert all(len(set(ids)) == 3 for ids in chosen)
    assert np.abs(np.bincount(np.ravel(chosen)) / 1000 - 1).max() < 0.1
    draws = []
    for _ in range(2):
        with random_state(5):
            draws.append(paired_boxes(proposals, move, move, 100, 100, k=3))
    assert all(np.array_equal(x, y) for x, y in zip(*draws))


def test_jitter_moves_half_of_view_as_boxes_and_none_of_view_bs():
    move = T.TransformList([T.NoOpTransform()])
    proposal = np.array([[100.0, 200, 150, 300]])
    np.random.seed(0)
    boxes_a, boxes_b, _ = paired_boxes(proposal, move, move, 500, 500, k=4000, jitter=0.1)
    assert (boxes_b == proposal).all()
    moved = (boxes_a != proposal).any(1)
    assert abs(moved.mean() - 0.5) < 0.03
    shift = (boxes_a[moved, :2] - proposal[0, :2]) / [50, 100]
    stretch = (boxes_a[moved, 2:] - boxes_a[moved, :2]) / [50, 100] - 1
    for amount in (shift, stretch):
        assert np.abs(amount).max() <= 0.1001 and (np.abs(amount).max(0) > 0.095).all()
        assert np.abs(amount.mean(0)).max() < 0.01
    edge, _, _ = paired_boxes(np.array([[0, 0, 60, 60]]), move, move, 60, 60, k=500, jitter=0.1)
    assert edge.min() >= 0 and edge.max() <= 60


@pytest.mark.parametrize("proposals", [np.zeros((0, 4)), np.array([[0, 0, 3, 3.0]])])
def test_without_a_proposal_the_shared_window_is_the_box(proposals):
    rng = np.random.default_rng(1)
    photo, overlaps = ramp(), 0
    for seed in range(10):
        np.random.seed(seed)
        a, b = (draw_view(View(96, flip=flip, **PLAIN), photo) for flip in (0.0, 1.0))
        boxes_a, boxes_b, ids = paired_boxes(proposals, a[1], b[1], 96, 96, k=3)
        assert (ids == len(proposals)).all()  # crops of half the photo and more always meet
        assert (boxes_a == boxes_a[0]).all() and (boxes_b == boxes_b[0]).all()
        in_photo = [apply_boxes(t.inverse(), [box])[0] for (_, t), box in
                    ((a, boxes_a[0]), (b, boxes_b[0]))]  # fmt: skip
        assert np.abs(in_photo[0] - in_photo[1]).max() < 1e-3
        for point in rng.uniform(in_photo[0][:2], in_photo[0][2:], (200, 2)):
            for _, transforms in (a, b):
                assert (0 <= apply_points(transforms, [point])[0]).all()
                assert (apply_points(transforms, [point])[0] <= 96).all()
        overlaps += (in_photo[0][2:] - in_photo[0][:2]).prod() < HEIGHT * WIDTH * 0.9
    assert overlaps > 3


def test_crops_that_do_not_meet_are_no_match():
    left, right = (
        T.TransformList([T.CropTransform(x, 0, 40, 100, 100, 100),
                         T.ResizeTransform(100, 40, 64, 64)])
        for x in (0, 60)
    )  # fmt: skip
    boxes_a, boxes_b, ids = paired_boxes(np.array([[0, 0, 30, 30]]), left, right, 64, 64, k=2)
    assert ids.tolist() == [-1, -1] and boxes_a.tolist() == [[0, 0, 64, 64]] * 2
    assert boxes_b.tolist() == [[0, 0, 64, 64]] * 2
    assert (paired_boxes(np.zeros((0, 4)), left, right, 64, 64, k=2, min_size=0)[2] == -1).all()
    touching = T.TransformList([T.CropTransform(36, 0, 64, 100, 100, 100),
                                T.ResizeTransform(100, 64, 64, 64)])  # fmt: skip
    assert (paired_boxes(np.zeros((0, 4)), left, touching, 64, 64, k=2)[2] == -1).all()  # 4 px


def test_cut_out_covers_the_stated_area_near_the_box():
    image = np.zeros((200, 200, 3), dtype=np.uint8)
    box, fill = np.array([[50.0, 60, 150, 160]]), (1, 2, 3)
    np.random.seed(0)
    shares = []
    for _ in range(300):
        covered = cut_out(image, box, fill, 1.0)
        ys, xs = np.nonzero(covered[..., 0])
        assert (covered[ys, xs] == fill).all()
        assert xs.min() >= 50 - 28 and xs.max() <= 150 + 28  # at most half of sqrt(.3) * 100
        shares.append(len(xs) / 100**2)
    assert 0.09 < min(shares) < 0.12 and 0.28 < max(shares) < 0.32
    assert abs(np.mean(shares) - 0.2) < 0.01
    assert not image.any()


def test_cut_out_happens_per_box_with_probability_p():
    image = np.zeros((100, 100, 3), dtype=np.float32)
    boxes = np.array([[10.0, 10, 30, 30], [60, 60, 90, 90]])
    np.random.seed(0)
    drawn = [cut_out(image, boxes, (9.5,) * 3, 0.5) for _ in range(1000)]
    first = [x[:45, :45].any() for x in drawn]
    second = [x[45:, 45:].any() for x in drawn]
    assert abs(np.mean(first) - 0.5) < 0.05 and abs(np.mean(second) - 0.5) < 0.05
    assert abs(np.mean(np.logical_and(first, second)) - 0.25) < 0.05
    assert not cut_out(image, boxes, 1, 0.0).any()
    corner = cut_out(image, np.array([[80.0, 80, 100, 100]]), (1, 1, 1), 1.0)  # at the border
    assert corner.shape == image.shape and corner.any()


def full_squares(holes, side):
    """Number of pixels in those squares of side x side px that fit into the holes."""
    framed = np.pad(holes.astype(np.uint8), side)  # OpenCV takes what lies outside for a hole
    return cv2.morphologyEx(framed, cv2.MORPH_OPEN, np.ones((side, side), np.uint8)).sum()


@pytest.mark.parametrize("size, share, largest", [(224, 0.25, 0.25), (64, 0.5, 0.125)])
def test_holes_are_squares_that_cover_the_share(size, share, largest):
    random.seed(0)
    drawn = [draw_holes(size, share, largest)[0].numpy() for _ in range(200)]
    assert drawn[0].dtype == bool and drawn[0].shape == (size, size)
    assert max(d.mean() for d in drawn) <= share
    assert np.mean([d.mean() for d in drawn]) > 0.98 * share
    least = int(largest * size / 2)
    assert np.mean([full_squares(d, least) for d in drawn]) > 0.97 * share * size**2
    inside = slice(size // 8, -size // 8)
    assert np.mean(drawn, axis=0)[inside, inside].min() > 0 and np.any(drawn, axis=0)[0].any()


def test_no_hole_is_larger_than_asked():
    random.seed(0)
    # So few of 8 px a side that they hardly ever make a larger one together.
    drawn = [draw_holes(64, 0.07, 0.125)[0].numpy() for _ in range(100)]
    assert all(full_squares(d, 6) for d in drawn) and any(full_squares(d, 8) for d in drawn)
    assert sum(full_squares(d, 12) > 0 for d in drawn) <= 1
    assert all(draw_holes(64, 0.02, 0.5).float().mean() > 0.01 for _ in range(20))  # share is less


def test_holes_scale_with_the_view_and_are_drawn_from_random():
    draws = []
    for seed, size in ((3, 64), (3, 224), (4, 64)):
        random.seed(seed)
        draws.append(draw_holes(size, 0.25, 0.25)[0])
    assert (draws[0][::2, ::2] == draws[1][::7, ::7]).all() and (draws[0] != draws[2]).any()
