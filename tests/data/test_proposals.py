import json
import os

import numpy as np
import pytest
from detectron2.structures import BoxMode

from d2ssl.data.proposals import (
    annotation_boxes,
    attach_proposals,
    filter_boxes,
    grid_boxes,
    random_boxes,
)
from d2ssl.errors import D2SSLError


def photo_of(path):
    """A photo as attach_proposals reads it: the file's bytes are the seed of a drawing."""
    with open(path, "rb") as file:
        seed = file.read()[0]
    image = np.full((90, 120, 3), 40, dtype=np.uint8)
    image[20:60, 30 : 60 + seed % 10] = (200, 60, 60)
    return image


def unreadable(path):
    raise AssertionError(f"{path} was decoded")


@pytest.fixture
def dicts(tmp_path):
    made = []
    for i in range(3):
        path = tmp_path / f"{i}.jpg"
        path.write_bytes(bytes([i]))
        made.append({"file_name": str(path), "image_id": i, "height": 90, "width": 120})
    return made


def assert_inside(boxes, height, width):
    assert boxes.dtype == np.float32 and boxes.shape[1] == 4
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes[:, 2] <= width + 1e-3).all() and (boxes[:, 3] <= height + 1e-3).all()


@pytest.mark.parametrize("height, width", [(300, 400), (400, 100), (32, 32)])
def test_grid_covers_the_photo(height, width):
    boxes = grid_boxes(height, width)
    assert_inside(boxes, height, width)
    covered = np.zeros((height, width), dtype=bool)
    smallest = boxes[(boxes[:, 2] - boxes[:, 0]) < 0.3 * np.sqrt(height * width)]
    for x1, y1, x2, y2 in smallest:
        covered[int(np.floor(y1)) : int(np.ceil(y2)), int(np.floor(x1)) : int(np.ceil(x2))] = True
    assert covered.all()


def test_random_boxes_have_the_stated_distribution():
    boxes = random_boxes(1000, 1000, 20000, np.random.default_rng(0), (0.05, 0.4), 2.0)
    assert_inside(boxes, 1000, 1000)
    w, h = (boxes[:, 2:] - boxes[:, :2]).T.astype(float)
    size = np.log(np.sqrt(w * h) / 1000)
    assert size.min() >= np.log(0.05) - 1e-3 and size.max() <= np.log(0.4) + 1e-3
    # The middle of a log-uniform variable is the geometric mean of its ends.
    assert abs(np.median(size) - np.log(np.sqrt(0.05 * 0.4))) < 0.05
    assert np.abs(np.log(w / h)).max() <= np.log(2) + 1e-3
    centre = (boxes[:, :2] + boxes[:, 2:]).mean(0) / 2
    assert np.abs(centre - 500).max() < 10
    again = random_boxes(1000, 1000, 20000, np.random.default_rng(0), (0.05, 0.4), 2.0)
    assert np.array_equal(boxes, again)


def test_filter_applies_each_limit_in_its_unit():
    # In an 800x400 photo 12 px of the 400-px copy are 24 px; sqrt(H*W) is 565.7.
    keep, thin, small, long, large = (
        [0, 0, 40, 30],  # scale 0.061
        [0, 0, 60, 23],  # 11.5 px of the copy high
        [0, 0, 27, 27],  # scale 0.048
        [0, 0, 310, 100],  # aspect 3.1
        [0, 0, 600, 380],  # scale 0.84
    )
    boxes = np.array([keep, thin, small, long, large])
    assert filter_boxes(boxes, 400, 800).tolist() == [keep]
    assert filter_boxes(boxes, 400, 800, max_aspect=3.2).tolist() == [keep, long]
    assert filter_boxes(boxes, 400, 800, min_scale=0.04).tolist() == [keep, small]
    assert filter_boxes(boxes, 400, 800, max_scale=0.9).tolist() == [keep, large]
    assert filter_boxes(boxes, 400, 800, min_size=11).tolist() == [keep, thin]


def test_filter_falls_back_step_by_step():
    too_small_for_scale, slim, tiny = [0, 0, 50, 50], [0, 0, 200, 40], [0, 0, 5, 5]
    strict = {"height": 400, "width": 400, "min_size": 32, "min_scale": 0.3}
    found = filter_boxes(np.array([too_small_for_scale, slim, tiny]), **strict)
    assert found.tolist() == [too_small_for_scale]
    assert filter_boxes(np.array([slim, tiny]), **strict).tolist() == [slim]
    assert filter_boxes(np.array([tiny]), **strict).tolist() == [[0, 0, 400, 400]]
    assert filter_boxes(np.zeros((0, 4)), **strict).tolist() == [[0, 0, 400, 400]]


def test_filter_clips_to_the_photo():
    found = filter_boxes(np.array([[-50, -50, 60, 70], [500, 0, 600, 90]]), 100, 400)
    assert found.tolist() == [[0, 0, 60, 70]]


def test_annotations_are_kept_whatever_their_size(dicts, caplog):
    one = dict(dicts[0])
    one["annotations"] = [
        {"bbox": [10, 20, 3, 2], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0},
        {"bbox": [0, 0, 119, 89], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0},
        {"bbox": [0, 0, 50, 50], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 1},
    ]
    assert annotation_boxes(one).tolist() == [[10, 20, 13, 22], [0, 0, 119, 89]]
    labelled, bare = attach_proposals([one, dicts[1]], "annotations", unreadable, min_scale=0.3)
    assert [r.getMessage()[:9] for r in caplog.records] == ["1 of 2 ph"]
    assert labelled["proposal_boxes"].tolist() == [[10, 20, 13, 22], [0, 0, 119, 89]]
    assert bare["proposal_boxes"].tolist() == [[0, 0, 120, 90]]
    with pytest.raises(D2SSLError, match="none of 3 photos .* SSL.DATASETS"):
        attach_proposals(dicts, "annotations", unreadable)


@pytest.mark.parametrize("source", ["selective_search", "grid", "random"])
def test_attach_writes_detectron2s_fields_to_copies(dicts, source):
    before = [dict(d) for d in dicts]
    attached = attach_proposals(dicts, source, photo_of, num_workers=0)
    assert dicts == before
    for old, new in zip(dicts, attached):
        assert new["file_name"] == old["file_name"] and new["image_id"] == old["image_id"]
        assert_inside(new["proposal_boxes"], 90, 120)
        assert new["proposal_bbox_mode"] == BoxMode.XYXY_ABS
        assert new["proposal_objectness_logits"].shape == (len(new["proposal_boxes"]),)
    again = attach_proposals(dicts, source, photo_of, num_workers=0)
    for a, b in zip(attached, again):
        assert np.array_equal(a["proposal_boxes"], b["proposal_boxes"])


def test_random_source_differs_between_photos(dicts):
    a, b, _ = attach_proposals(dicts, "random", unreadable)
    assert not np.array_equal(a["proposal_boxes"][:5], b["proposal_boxes"][:5])


def test_processes_give_what_one_gives(dicts):
    alone = attach_proposals(dicts, "selective_search", photo_of, num_workers=0)
    shared = attach_proposals(dicts, "selective_search", photo_of, num_workers=2)
    for a, b in zip(alone, shared):
        assert np.array_equal(a["proposal_boxes"], b["proposal_boxes"])
    widths = {boxes["proposal_boxes"].tobytes() for boxes in alone}
    assert len(widths) == 3  # each photo's own boxes, not another's


def test_cache_spares_the_photo_and_follows_its_content(dicts, tmp_path):
    cache = str(tmp_path / "cache")
    first = attach_proposals(dicts, "selective_search", photo_of, cache, num_workers=0)
    moved = [dict(d) for d in dicts]
    for i, d in enumerate(moved):
        d["file_name"] = str(tmp_path / f"moved{i}.jpg")
        os.rename(dicts[i]["file_name"], d["file_name"])
    second = attach_proposals(moved, "selective_search", unreadable, cache, num_workers=0)
    for a, b in zip(first, second):
        assert np.array_equal(a["proposal_boxes"], b["proposal_boxes"])
    with open(moved[0]["file_name"], "wb") as file:
        file.write(b"\x09")  # the photo is edited: its boxes must not be the old ones
    with pytest.raises(AssertionError, match="was decoded"):
        attach_proposals(moved, "selective_search", unreadable, cache, num_workers=0)


def test_filter_keys_act_on_cached_boxes_too(dicts, tmp_path):
    cache = str(tmp_path / "cache")
    attach_proposals(dicts, "selective_search", photo_of, cache, num_workers=0)
    large = attach_proposals(
        dicts, "selective_search", unreadable, cache, num_workers=0, min_scale=0.9, max_scale=1.0
    )
    assert all(d["proposal_boxes"].tolist() == [[0, 0, 120, 90]] for d in large)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\x01\x00 half a file", b"not an array"])
def test_damaged_cache_entry_is_computed_again(dicts, tmp_path, damage):
    cache = tmp_path / "cache"
    first = attach_proposals(dicts, "selective_search", photo_of, str(cache), num_workers=0)
    entries = sorted(cache.iterdir())
    assert len(entries) == 3
    for entry in entries:
        entry.write_bytes(damage)
    again = attach_proposals(dicts, "selective_search", photo_of, str(cache), num_workers=0)
    for a, b in zip(first, again):
        assert np.array_equal(a["proposal_boxes"], b["proposal_boxes"])
    attach_proposals(dicts, "selective_search", unreadable, str(cache), num_workers=0)
    assert sorted(cache.iterdir()) == entries  # and no temporary file is left


def test_cache_is_readable_for_others(dicts, tmp_path):
    before = os.umask(0o022)
    try:
        attach_proposals(dicts, "selective_search", photo_of, str(tmp_path / "c"), num_workers=0)
    finally:
        os.umask(before)
    assert {entry.stat().st_mode & 0o777 for entry in (tmp_path / "c").iterdir()} == {0o644}


def full(file, boxes):
    file.write(b"half")
    raise OSError(28, "No space left on device")


def test_cache_that_cannot_be_used_is_named(dicts, tmp_path, monkeypatch):
    fix = "set SSL.PROPOSALS.CACHE_DIR or D2SSL_CACHE"
    (tmp_path / "file").touch()
    with pytest.raises(D2SSLError, match=f"file: cannot be written .*{fix}"):
        attach_proposals(dicts, "selective_search", unreadable, str(tmp_path / "file"))
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(D2SSLError, match=f"cache: cannot be written .No space.*{fix}"):
        attach_proposals(
            dicts, "selective_search", photo_of, str(tmp_path / "cache"), num_workers=0
        )
    assert not [*(tmp_path / "cache").iterdir()]


def test_cache_entry_of_another_user_is_not_called_damaged(dicts, tmp_path, monkeypatch, caplog):
    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "load", forbidden)
    attach_proposals(dicts[:1], "selective_search", photo_of, str(tmp_path / "c"))
    (record,) = caplog.records
    assert "cannot be read" in record.message and "damaged" not in record.message


def test_json_boxes_are_matched_by_the_longest_name(dicts, tmp_path):
    folders = [dict(dicts[0], file_name=f"/any/where/{name}/1.jpg") for name in "ab"]
    images = [{"id": 7, "file_name": "b/1.jpg"}, {"id": 8, "file_name": "1.jpg"}]
    annotations = [
        {"image_id": 7, "bbox": [1, 2, 30, 40]},
        {"image_id": 8, "bbox": [5, 6, 7, 8]},
        {"image_id": 8, "bbox": [100, 80, 50, 50]},
    ]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    a, b = attach_proposals(folders, str(path), unreadable)
    assert a["proposal_boxes"].tolist() == [[5, 6, 12, 14], [100, 80, 120, 90]]
    assert b["proposal_boxes"].tolist() == [[1, 2, 31, 42]]


@pytest.mark.parametrize(
    "size, box",
    [
        ((90, 120), [10, 20, 40, 60]),
        ((180, 240), [5, 10, 20, 30]),
        ((45, 61), [10 * 120 / 61, 40, 40 * 120 / 61, 90]),  # made smaller, and rounded
        ((None, 120), [10, 20, 40, 60]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_json_boxes_are_scaled_to_the_photo(dicts, tmp_path, size, box):
    image = {"id": 0, "file_name": "0.jpg", "height": size[0], "width": size[1]}
    boxes = [{"image_id": 0, "bbox": [10, 20, 30, 40]}, {"image_id": 0, "bbox": [3, 3, 0, 0]}]
    (tmp_path / "boxes.json").write_text(json.dumps({"images": [image], "annotations": boxes}))
    (photo,) = attach_proposals(dicts[:1], str(tmp_path / "boxes.json"), unreadable)
    np.testing.assert_allclose(photo["proposal_boxes"], [box], rtol=1e-6)


@pytest.mark.parametrize("size", [(120, 90), (90, 124), (480, 600)])
def test_json_boxes_of_another_shape_of_photo_are_refused(dicts, tmp_path, size):
    image = {"id": 0, "file_name": "0.jpg", "height": size[0], "width": size[1]}
    (tmp_path / "boxes.json").write_text(json.dumps({"images": [image], "annotations": []}))
    with pytest.raises(D2SSLError, match=f"0.jpg of {size[1]}x{size[0]}, but it is 120x90"):
        attach_proposals(dicts[:1], str(tmp_path / "boxes.json"), unreadable)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"images": []}', '{"images": [{"id": 1}], "annotations": []}']
)
def test_json_of_another_form_is_refused(dicts, tmp_path, text):
    path = tmp_path / "boxes.json"
    path.write_text(text)
    with pytest.raises(D2SSLError, match="not a COCO-format file"):
        attach_proposals(dicts, str(path), unreadable)


def test_json_of_other_photos_is_refused(dicts, tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text('{"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": []}')
    with pytest.raises(D2SSLError, match="names none of the photos"):
        attach_proposals(dicts, str(path), unreadable)


def test_missing_photo_is_refused(dicts, tmp_path):
    os.remove(dicts[1]["file_name"])
    with pytest.raises(D2SSLError, match="1.jpg"):
        attach_proposals(dicts, "selective_search", photo_of, str(tmp_path / "c"), num_workers=2)
