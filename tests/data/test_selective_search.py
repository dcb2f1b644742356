import time

import cv2
import numpy as np
import pytest

from d2ssl.data.selective_search import Regions, _merge, _neighbours, selective_search


def best_iou(box, boxes):
    top, bottom = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    shared = (bottom - top).clip(0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + np.prod(box[2:] - box[:2])
    return (shared / (areas - shared)).max()


def drawing(height, width):
    """Disks and rectangles on textured ground, and their boxes."""
    rng = np.random.default_rng(0)
    ground = rng.normal(0, 1, (height // 8, width // 8)).astype(np.float32)
    ground = cv2.resize(ground, (width, height), interpolation=cv2.INTER_CUBIC) * 12
    image = (np.array([90, 120, 70]) + ground[..., None]).clip(0, 255).astype(np.uint8)
    s = width / 400
    boxes = []
    for (x, y, r), colour in zip(
        [(70, 70, 40), (330, 60, 25), (90, 230, 55)], [(220, 40, 40), (40, 60, 220), (230, 210, 60)]
    ):
        cv2.circle(image, (round(x * s), round(y * s)), round(r * s), colour, -1)
        boxes.append(np.array([x - r, y - r, x + r, y + r]) * s)
    for (x, y, w, h), colour in zip(
        [(180, 30, 70, 50), (220, 150, 130, 100)], [(240, 240, 240), (150, 30, 160)]
    ):
        x1, y1, x2, y2 = np.round(np.array([x, y, x + w, y + h]) * s).astype(int)
        image[y1:y2, x1:x2] = colour
        boxes.append(np.array([x1, y1, x2, y2]))
    return image, boxes


@pytest.mark.parametrize("width", [400, 1000, 200])
def test_finds_each_drawn_object(width):
    image, objects = drawing(width * 3 // 4, width)
    found = selective_search(image)
    assert found.dtype == np.float32 and len(np.unique(found, axis=0)) == len(found)
    assert (found[:, :2] >= 0).all() and (found[:, 2:] <= [width + 0.01, width * 0.75 + 0.01]).all()
    assert len(found) < 1000
    for box in objects:
        assert best_iou(box, found) > 0.7


def test_finds_an_object_of_many_colours_by_merging():
    image = np.full((120, 160, 3), 90, dtype=np.uint8)
    image[40:80, 50:70] = (200, 40, 40)
    image[40:80, 70:100] = (210, 120, 40)
    found = selective_search(image)
    for box in ([50, 40, 70, 80], [70, 40, 100, 80], [50, 40, 100, 80]):
        assert best_iou(np.array(box), found) > 0.8


@pytest.mark.parametrize("shape", [(8, 8, 3), (1, 50, 3), (600, 20, 3)])
def test_odd_sizes_and_blank_photos_give_the_whole_photo(shape):
    found = selective_search(np.full(shape, 128, dtype=np.uint8))
    assert np.allclose(found, [[0, 0, shape[1], shape[0]]])


def test_time_is_bounded_for_large_noise():
    # Without its copy and its heap the search of such a photo takes minutes.
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    selective_search(noise[:300, :400])  # pays for the import
    start = time.process_time()
    selective_search(noise)
    assert time.process_time() - start < 5


def grid_of_segments():
    labels = np.zeros((6, 9), dtype=np.int64)
    labels[:, 3:6], labels[:, 6:], labels[3:, :3] = 1, 2, 3
    image = np.array([[10, 10, 10], [20, 200, 20], [20, 190, 20], [240, 20, 20]])[labels]
    return image.astype(np.uint8), labels


def test_neighbours_share_a_border():
    _, labels = grid_of_segments()
    assert _neighbours(labels, 7)[:4] == [{1, 3}, {0, 2, 3}, {1}, {0, 1}]


def test_segments_and_unions_have_exact_boxes_and_features():
    image, labels = grid_of_segments()
    regions = Regions(image, labels)
    expected = [[0, 0, 3, 3], [3, 0, 6, 6], [6, 0, 9, 6], [0, 3, 3, 6]]
    assert regions.box[:4].tolist() == expected and regions.size[:4].tolist() == [9, 18, 18, 9]
    assert np.allclose(regions.features[:4].sum(1), 2)  # colour and texture, 1 each
    new = regions.merge(0, 1)
    assert regions.box[new].tolist() == [0, 0, 6, 6]  # region 3 lies inside, but is not part
    assert np.allclose(regions.features[new], (regions.features[0] + 2 * regions.features[1]) / 3)
    # Size and fill of the union with 3: 36 of 54 px; its box has 36 px, so there is no gap.
    features = np.minimum(regions.features[new], regions.features[3]).sum()
    assert np.isclose(regions.similarity(new, [3])[0], features + (1 - 36 / 54) + 1)


def test_merging_ends_with_the_whole_photo_and_most_alike_go_first():
    image, labels = grid_of_segments()
    boxes = _merge(image, labels)
    assert len(boxes) == 7 and boxes[-1].tolist() == [0, 0, 9, 6]
    regions = Regions(image, labels)
    pairs = [(a, b) for a, others in enumerate(_neighbours(labels, 7)[:4]) for b in others]
    scores = [regions.similarity(a, [b])[0] for a, b in pairs]
    a, b = pairs[int(np.argmax(scores))]
    both = np.concatenate([np.minimum(boxes[a], boxes[b])[:2], np.maximum(boxes[a], boxes[b])[2:]])
    assert boxes[4].tolist() == both.tolist()


def test_a_union_keeps_the_neighbours_of_both():
    # Three strips; the first two are alike, and only the second touches the third.
    labels = np.repeat([0, 1, 2], 20)[None].repeat(30, 0)
    image = np.array([[20, 200, 20], [20, 199, 20], [240, 20, 20]], dtype=np.uint8)[labels]
    assert _merge(image, labels)[3:].tolist() == [[0, 0, 40, 30], [0, 0, 60, 30]]
