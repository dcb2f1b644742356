import copy

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.structures import PolygonMasks
from torch.nn import functional as F

from d2ssl.config import finetune_cfg, pretrain_cfg
from d2ssl.data.build import (
    build_finetune_loader,
    build_pretrain_loader,
    build_validation_batches,
    load_dicts,
)
from d2ssl.data.datasets import register_dataset
from d2ssl.data.loader import random_state
from d2ssl.data.mapper import DetectionMapper, PretextMapper, to_tensor
from d2ssl.data.masks import mask_annotation
from d2ssl.data.photos import PhotoStore, read_photo
from d2ssl.data.regions import grid_regions
from d2ssl.data.views import View
from d2ssl.errors import D2SSLError

PLAIN = dict(crop_scale=None, flip=0, jitter_p=0, gray=0, blur_p=0, solarize_p=0)
BOXES, NOTHING = frozenset({"boxes"}), frozenset()
ALL = frozenset({"boxes", "regions", "holes"})
# The whole photo, and two crops in which boxes are covered.
VIEWS = [View(64, crop_scale=None), View(64, cutout_p=1.0), View(32, cutout_p=1.0)]
PAIRS = [(0, 1), (0, 2)]


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_pretraining_normalises_as_the_stock_detector(tiny_cfg, image_format):
    """One photo through the mapper and network, and through Detectron2's own mapper and model."""
    from detectron2.modeling import build_model

    from d2ssl.modeling.pretext_model import PretextModel

    cfg = tiny_cfg("INPUT.FORMAT", image_format, "MODEL.PIXEL_STD", "(50., 60., 70.)")
    dicts = load_dicts(["balloon_demo_train"])[:2]
    item = PretextMapper(cfg, read_photo, [View(64, **PLAIN)], [], NOTHING)(dicts[0])
    ours = PretextModel(pretrain_cfg(cfg)).normalize(item["views"][0][None])[0]

    stock_cfg = finetune_cfg(tiny_cfg("SSL.ENABLED", "False", "INPUT.FORMAT", image_format,
                                      "MODEL.PIXEL_STD", "(50., 60., 70.)"))  # fmt: skip
    image = DatasetMapper(stock_cfg, is_train=False)(copy.deepcopy(dicts[0]))["image"]
    theirs = build_model(stock_cfg).preprocess_image([{"image": image}]).tensor[0]
    # The view is squeezed to 64 x 64 and the stock image resized, so compare plane means.
    height, width = image.shape[1:]
    torch.testing.assert_close(
        ours.mean((1, 2)), theirs[:, :height, :width].mean((1, 2)), rtol=0, atol=0.03
    )
    planes = theirs[:, :height, :width].mean((1, 2))
    assert (planes[0] - planes[2]).abs() > 0.1  # a flip of the planes would show


def test_colour_order_is_the_configs():
    photo = np.zeros((2, 3, 3), np.uint8)
    photo[..., 0] = 200  # red
    assert to_tensor(photo, "RGB")[0].eq(200).all() and to_tensor(photo, "BGR")[2].eq(200).all()


def test_proposals_follow_a_photo_that_was_scaled_down(tiny_cfg, tmp_path):
    """A bright square at a known place, in a photo kept at half its size: the box finds it."""
    photo = np.zeros((200, 300, 3), np.uint8)
    photo[100:160, 200:260] = 255
    path = str(tmp_path / "square.png")
    cv2.imwrite(path, photo)
    cfg = tiny_cfg("SSL.SOCO.NUM_BOXES", "1", "SSL.SOCO.BOX_JITTER", "0.")
    views = [View(size=96, **PLAIN), View(size=64, **{**PLAIN, "flip": 1.0})]
    mapper = PretextMapper(cfg, PhotoStore(100).get, views, [(0, 1)], BOXES)
    boxes = np.array([[200.0, 100, 260, 160]], np.float32)
    item = mapper({"file_name": path, "image_id": 0, "height": 200, "width": 300,
                   "proposal_boxes": boxes})  # fmt: skip
    (pair,) = item["pairs"]
    for image, box, size in zip(item["views"], pair["boxes"], (96, 64)):
        x1, y1, x2, y2 = box[0].round().int().tolist()
        inside = image[0, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].float()
        outside = (image[0].float().sum() - inside.sum()) / (size * size - inside.numel())
        assert inside.mean() > 250 and outside < 25


def test_cut_outs_become_zero_after_normalisation(tiny_cfg):
    cfg = pretrain_cfg(tiny_cfg())
    item = build_pretrain_loader(cfg, VIEWS, PAIRS, BOXES).stream[0]
    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).round().view(3, 1, 1)
    assert (item["views"][1].float() - mean).abs().le(1).all(0).float().mean() > 0.02
    assert (item["views"][0].float() - mean).abs().le(1).all(0).float().mean() < 0.02


def test_no_annotation_reaches_pretraining(tiny_cfg):
    cfg = pretrain_cfg(tiny_cfg("SSL.DATASETS", "('balloon_demo_train',)"))
    stream = build_pretrain_loader(cfg, VIEWS, PAIRS, ALL).stream
    assert not any("annotations" in d for d in stream.dicts)
    assert set(stream[0]) == {
        "image_id", "windows", "pairs", "views", "regions", "holes", "index", "position",
    }  # fmt: skip


def test_only_what_a_method_needs_is_looked_for_and_drawn(tiny_cfg):
    cfg = pretrain_cfg(tiny_cfg("SSL.REGIONS.SOURCE", "grid", "SSL.REGIONS.NUM", "6"))
    found = {}
    for name in ALL:
        stream = build_pretrain_loader(cfg, VIEWS, PAIRS, frozenset({name})).stream
        found[name] = stream[0]
        assert [f in stream.dicts[0] for f in ("proposal_boxes", "regions")] == [
            name == "boxes", name == "regions"
        ]  # fmt: skip
        if name == "regions":
            assert stream.dicts[0]["regions"].tolist() == [[0, 1, 2], [3, 4, 5]]
    always = {"image_id", "windows", "pairs", "views", "index", "position"}
    assert set(found["boxes"]) == always and len(found["boxes"]["pairs"]) == 2
    assert set(found["regions"]) == {*always, "regions"} and found["regions"]["pairs"] == []
    assert set(found["holes"]) == {*always, "holes"}


def test_what_is_added_leaves_the_views_and_boxes_as_they_are(tiny_cfg):
    cfg = pretrain_cfg(tiny_cfg("SSL.REGIONS.SOURCE", "grid"))
    plain, full = (build_pretrain_loader(cfg, VIEWS, PAIRS, n).stream for n in (BOXES, ALL))
    for position in range(4):
        a, b = plain[position], full[position]
        assert all(torch.equal(*pair) for pair in zip(a["views"], b["views"]))
        for x, y in zip(a["pairs"], b["pairs"]):
            assert torch.equal(x["ids"], y["ids"])
            assert all(torch.equal(*pair) for pair in zip(x["boxes"], y["boxes"]))


def test_photos_are_kept_as_large_as_the_views_need(tiny_cfg):
    cfg = pretrain_cfg(tiny_cfg("SSL.INPUT.CROP_SCALE", "(0.01,1.0)"))
    small = build_pretrain_loader(cfg, [View(32, crop_scale=(0.25, 1.0))], [], NOTHING)
    windows = [small.stream[i]["windows"][0] for i in range(12)]
    assert all(w.max() <= 64 * 128 / 96 + 1e-3 for w in windows)  # of 96 x 128 px, at 64 px
    large = build_pretrain_loader(cfg, [View(64, crop_scale=None)], [], NOTHING)
    assert sorted(large.stream[0]["windows"][0].abs().tolist())[2:] == [64, 85]


def test_windows_are_in_pixels_of_the_photo_in_memory(tiny_cfg, tmp_path):
    """A photo kept at half its size, whose red is x and whose green is y."""
    y, x = np.indices((200, 300)) // 2
    path = str(tmp_path / "ramp.png")
    cv2.imwrite(path, np.stack([0 * x, y, x], -1).astype(np.uint8))
    cfg = tiny_cfg("INPUT.FORMAT", "RGB")
    views = [View(96, **PLAIN), View(64, **{**PLAIN, "crop_scale": (0.2, 0.5), "flip": 1.0}),
             View(32, **PLAIN, of=1)]  # fmt: skip
    mapper = PretextMapper(cfg, PhotoStore(100).get, views, [(0, 1)], NOTHING)
    for seed in range(4):
        with random_state(seed):
            item = mapper({"file_name": path, "image_id": 0, "height": 200, "width": 300})
        assert item["windows"].shape == (3, 4) and item["windows"].dtype == torch.float32
        assert item["windows"][0].tolist() == [0, 0, 150, 100]
        assert torch.equal(item["windows"][2], item["windows"][1][[2, 1, 0, 3]])
        for image, (left, top, right, bottom) in zip(item["views"], item["windows"].tolist()):
            cells = image[:2].float().unflatten(1, (-1, 8)).unflatten(3, (-1, 8)).mean((2, 4)) + 0.5
            steps = (torch.arange(cells.shape[1]) + 0.5) / cells.shape[1]
            assert (cells[0] - (left + (right - left) * steps)).abs().max() < 1
            assert (cells[1] - (top + (bottom - top) * steps)[:, None]).abs().max() < 1


def test_regions_are_those_of_the_pixels(tiny_cfg, tmp_path):
    """A photo in the colours of its regions, kept at half its size."""
    regions = grid_regions(200, 300, 16)
    path = str(tmp_path / "regions.png")
    cv2.imwrite(path, cv2.resize(regions, (300, 200), interpolation=cv2.INTER_NEAREST) * 10)
    views = [View(96, **PLAIN), View(64, **{**PLAIN, "crop_scale": (0.2, 0.5), "flip": 0.5})]
    mapper = PretextMapper(tiny_cfg(), PhotoStore(100).get, views, [], frozenset({"regions"}))
    record = {"file_name": path, "image_id": 0, "height": 200, "width": 300, "regions": regions}
    for seed in range(6):
        with random_state(seed):
            item = mapper(record)
        for image, labels in zip(item["views"], item["regions"]):
            assert labels.shape == (len(image[0]) // 4,) * 2 and labels.dtype == torch.int64
            cells = image[0].unfold(0, 4, 4).unfold(1, 4, 4).flatten(2).long()
            plain = cells.amin(2) == cells.amax(2)
            assert plain.float().mean() > 0.6 and (cells[..., 0] == labels * 10)[plain].all()


def test_holes_follow_the_config_and_the_seed(tiny_cfg):
    cfg = tiny_cfg("SSL.HOLES.SHARE", "0.5", "SSL.HOLES.SIZE", "0.04")  # 1/32
    d = load_dicts(["balloon_demo_train"])[0]
    mapper = PretextMapper(cfg, read_photo, VIEWS, PAIRS, frozenset({"holes"}))
    drawn = []
    for seed in (1, 1, 2):
        with random_state(seed):
            drawn.append(mapper(d)["holes"])
    for view, *holes in zip(VIEWS, *drawn):
        assert holes[0].shape == (1, view.size, view.size) and holes[0].dtype == torch.bool
        assert torch.equal(holes[0], holes[1]) and not torch.equal(holes[0], holes[2])
        assert 0.45 < holes[0].float().mean() <= 0.5
        # Half of all small squares, at random: they make no large one.
        assert F.avg_pool2d(holes[0].float(), view.size * 6 // 32, stride=1).max() < 1
    assert not torch.equal(drawn[0][0][0, ::2, ::2], drawn[0][2][0])  # each view has its own


def test_detection_mapper_is_the_stock_mapper(tiny_cfg):
    """On a photo that is not scaled down: equal pixels, boxes and masks under equal draws."""
    cfg = finetune_cfg(tiny_cfg("SSL.ENABLED", "False"))
    for d in load_dicts(["balloon_demo_train"])[:4]:
        with random_state(1, 2):
            ours = DetectionMapper(cfg, read_photo)(d)
        with random_state(1, 2):
            stock = DatasetMapper(cfg, True)(copy.deepcopy(d))
        assert torch.equal(ours["image"], stock["image"])
        assert torch.equal(ours["instances"].gt_boxes.tensor, stock["instances"].gt_boxes.tensor)
        for a, b in zip(ours["instances"].gt_masks.polygons, stock["instances"].gt_masks.polygons):
            np.testing.assert_array_equal(a[0], b[0])


def test_masks_follow_a_photo_that_was_scaled_down(tiny_cfg):
    cfg = finetune_cfg(tiny_cfg("SSL.ENABLED", "False", "INPUT.MIN_SIZE_TRAIN", "(48,)"))
    d = load_dicts(["balloon_demo_train"])[0]
    with random_state(3):
        full = DetectionMapper(cfg, read_photo)(d)
    with random_state(3):
        small = DetectionMapper(cfg, PhotoStore(48).get)(d)
    assert full["image"].shape == small["image"].shape
    assert (full["image"].float() - small["image"].float()).abs().mean() < 4
    a, b = full["instances"].gt_boxes.tensor, small["instances"].gt_boxes.tensor
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


@pytest.fixture
def ring_set(tmp_path):
    """A photo of 200 x 300, red on its left half, with a square ring (RLE), a polygon, a crowd."""
    photo = np.zeros((200, 300, 3), np.uint8)
    photo[:, :150, 2] = 255
    cv2.imwrite(str(tmp_path / "ring.png"), photo)
    ring = np.zeros((200, 300), bool)
    ring[100:160, 200:260] = True
    ring[120:140, 224:248] = False
    square = np.zeros_like(ring)
    square[40:80, 40:80] = True
    masks = [mask_annotation(ring, 0), mask_annotation(square, 0), mask_annotation(square, 0, 1)]
    assert [type(m["segmentation"]) for m in masks] == [dict, list, dict]
    entry = {"file_name": str(tmp_path / "ring.png"), "image_id": 0, "height": 200, "width": 300}
    register_dataset("ring", lambda: [copy.deepcopy({**entry, "annotations": masks})],
                     thing_classes=["ring"])  # fmt: skip
    return masks, ring


def ring_cfg(tiny_cfg, *opts):
    opts = ["DATASETS.TRAIN", "('ring',)", "INPUT.MIN_SIZE_TRAIN", "(100,50)", *opts]
    return finetune_cfg(tiny_cfg("SSL.ENABLED", "False", "INPUT.MAX_SIZE_TRAIN", "500", *opts))


def test_run_length_masks_are_scaled_and_flipped_along(tiny_cfg, ring_set, caplog):
    cfg = ring_cfg(tiny_cfg, "INPUT.FORMAT", "RGB")
    with caplog.at_level("INFO", "d2ssl"):
        stream = build_finetune_loader(cfg).stream  # in memory the photo is 100 x 150
    assert "INPUT.MASK_FORMAT bitmask in place of polygon" in caplog.text
    seen = set()
    for position in range(16):
        item = stream[position]
        masks, size = item["instances"].gt_masks.tensor.numpy(), item["image"].shape[1:]
        flipped = bool(item["image"][0, 0, 0] == 0)
        ring, square = np.zeros(size, bool), np.zeros(size, bool)
        n = 200 // size[0]  # both sizes divide all coordinates
        ring[100 // n : 160 // n, 200 // n : 260 // n] = True
        ring[120 // n : 140 // n, 224 // n : 248 // n] = False
        square[40 // n : 80 // n, 40 // n : 80 // n] = True
        for mask, expected in zip(masks, (ring, square)):
            expected = expected[:, ::-1] if flipped else expected
            assert (mask ^ expected).sum() <= (0 if expected.sum() == ring.sum() else 2 * 80 // n)
        assert len(masks) == 2  # no crowd
        assert item["instances"].gt_classes.tolist() == [0, 0]
        seen.add((n, flipped))
    assert seen == {(2, False), (2, True), (4, False), (4, True)}


def test_run_length_masks_at_any_scale(tiny_cfg, ring_set):
    """Against the mask scaled by area averaging, which is another rounding of the same shape."""
    _, ring = ring_set
    cfg = ring_cfg(tiny_cfg, "INPUT.MIN_SIZE_TEST", "73")
    ((item,),) = build_validation_batches(cfg, ["ring"])
    mask = item["instances"].gt_masks.tensor[0].numpy()
    assert mask.shape == (73, 110)
    scaled = cv2.resize(ring.astype(np.float32), (110, 73), interpolation=cv2.INTER_AREA) > 0.5
    assert (mask & scaled).sum() / (mask | scaled).sum() > 0.85
    hole = mask[73 * 122 // 200 : 73 * 138 // 200, 110 * 227 // 300 : 110 * 245 // 300]
    assert hole.size > 20 and not hole.any()


def test_a_detector_learns_from_run_length_masks(tiny_cfg, ring_set):
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    cfg = ring_cfg(tiny_cfg)
    item = build_finetune_loader(cfg).stream[0]
    with EventStorage(0):
        losses = build_model(cfg)([item])
    assert 0.5 < losses["loss_mask"].item() < 1  # log 2 for random weights


def test_polygons_stay_polygons(tiny_cfg, ring_set):
    masks, _ = ring_set
    del masks[0]  # a crowd's RLE, which is never learnt from, does not matter
    item = build_finetune_loader(ring_cfg(tiny_cfg)).stream[0]
    assert isinstance(item["instances"].gt_masks, PolygonMasks)


def test_annotation_of_another_shape_is_refused(tiny_cfg):
    cfg = finetune_cfg(tiny_cfg("SSL.ENABLED", "False"))
    d = dict(load_dicts(["balloon_demo_train"])[0])
    d["height"], d["width"] = d["width"], d["height"]
    with pytest.raises(D2SSLError, match="other proportions"):
        DetectionMapper(cfg, read_photo)(d)
