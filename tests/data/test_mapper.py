import copy

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, PolygonMasks
from torch.nn import functional as F

from d2ssl.config import finetune_cfg, pretrain_cfg
from d2ssl.data.build import (
    build_finetune_loader,
    build_pretrain_loader,
    build_validation_batches,
    calibration_batches,
    load_dicts,
    mapper_at_test_size,
)
from d2ssl.data.datasets import register_dataset
from d2ssl.data.loader import random_state
from d2ssl.data.mapper import DetectionMapper, PretextMapper, ScaleJitter, to_tensor
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


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_detection_mapper_is_the_stock_mapper(tiny_cfg, image_format):
    """On a photo that is not scaled down: equal pixels, boxes and masks under equal draws."""
    cfg = finetune_cfg(tiny_cfg("SSL.ENABLED", "False", "INPUT.FORMAT", image_format))
    dicts = load_dicts(["balloon_demo_train"])[:4]
    for d in dicts:
        with random_state(1, 2):
            ours, ours_next = DetectionMapper(cfg, read_photo, others=dicts)(d), np.random.rand()
        with random_state(1, 2):
            stock, stock_next = DatasetMapper(cfg, True)(copy.deepcopy(d)), np.random.rand()
        assert ours_next == stock_next  # no draw of our own
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
    for a, b in zip(full["instances"].gt_masks.polygons, small["instances"].gt_masks.polygons):
        np.testing.assert_allclose(a[0], b[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["absolute", "relative_range"])
def test_crops_are_cut_out_of_the_photo_as_it_is(tiny_cfg, kind):
    crop = {"absolute": "(40, 50)", "relative_range": "(0.5, 0.5)"}[kind]
    opts = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", kind, "INPUT.CROP.SIZE", crop]
    cfg = finetune_cfg(tiny_cfg("SSL.ENABLED", "False", *opts, "INPUT.MIN_SIZE_TRAIN", "(32,)"))
    stream = build_finetune_loader(cfg).stream
    for position in range(4):
        with random_state(stream.seed, 1, position):
            stock = DatasetMapper(cfg, True)(copy.deepcopy(stream.dicts[stream.order(position)]))
        ours = stream[position]
        assert torch.equal(ours["image"], stock["image"])
        assert torch.equal(ours["instances"].gt_boxes.tensor, stock["instances"].gt_boxes.tensor)


def test_photos_keep_their_size_where_nothing_scales_them(tiny_cfg):
    opts = ["SSL.ENABLED", "False", "INPUT.MIN_SIZE_TRAIN", "(0,)", "INPUT.MAX_SIZE_TRAIN", "999"]
    for jitter in ([], JITTER):
        item = build_finetune_loader(finetune_cfg(tiny_cfg(*opts, *jitter))).stream[0]
        assert sorted(item["image"].shape) == [3, 96, 128]


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


def test_masks_are_scaled_down_once_as_they_would_be_each_time(tiny_cfg, ring_set):
    masks, _ = ring_set
    cfg = ring_cfg(tiny_cfg, "INPUT.MIN_SIZE_TRAIN", "(61,)")
    stream = build_finetune_loader(cfg).stream
    (once,), (each,) = stream.dicts, load_dicts(["ring"])
    assert (once["height"], once["width"]) == (61, 92)
    assert once["annotations"][0]["segmentation"]["size"] == [61, 92]
    assert each["annotations"] == masks  # the set's own are as they were
    items = []
    for d in (once, each):
        with random_state(7):
            items.append(stream.mapper(d)["instances"])
    assert torch.equal(items[0].gt_masks.tensor, items[1].gt_masks.tensor)
    torch.testing.assert_close(items[0].gt_boxes.tensor, items[1].gt_boxes.tensor)


def test_what_crowds_are_drawn_with_does_not_matter(tiny_cfg, ring_set):
    """Training leaves them out, so none is read, scaled or refused."""
    masks, _ = ring_set
    masks.append({**masks[0], "iscrowd": 1, "segmentation": None})
    cfg = ring_cfg(tiny_cfg, "INPUT.MIN_SIZE_TRAIN", "(61,)")
    assert len(build_finetune_loader(cfg).stream[0]["instances"]) == 2


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
    torch.manual_seed(0)
    with EventStorage(0):
        losses = build_model(cfg)([item])
    assert 0.5 < losses["loss_mask"].item() < 1  # log 2 for random weights


def test_polygons_stay_polygons(tiny_cfg, ring_set):
    masks, _ = ring_set
    del masks[0]  # a crowd's RLE, which is never learnt from, does not matter
    item = build_finetune_loader(ring_cfg(tiny_cfg)).stream[0]
    assert isinstance(item["instances"].gt_masks, PolygonMasks)


# Each class has its colour; no two of them blend into a third.
COLOURS = np.array([(220, 0, 0), (0, 220, 0), (0, 0, 220), (220, 220, 0)])
GROUND, CROWD, MEAN = (40, 40, 40), (220, 0, 220), (10, 121, 231)
JITTER = ["SSL.FINETUNE.SCALE_JITTER", "(0.5,1.5)"]
PASTE = ["SSL.FINETUNE.COPY_PASTE", "1.0"]


@pytest.fixture
def coloured_set(tmp_path):
    """Photos of 120 x 180 and 180 x 120 with polygons, a ring (RLE) and a crowd in the colours of
    their classes, and one that shows nothing; a list of them, which is registered as it is."""
    dicts = []
    for shape, crowd in (((120, 180), False), ((180, 120), True)):
        disc, ring, bar, tile, group = np.zeros((5, *shape), np.uint8)
        cv2.circle(disc, (45, 40), 25, 1, -1)
        cv2.circle(ring, (80, 85), 30, 1, -1)
        cv2.circle(ring, (80, 85), 12, 0, -1)
        bar[5:45, 80:100], tile[70:110, 5:40] = 1, 1
        group[-50:, 40:] = crowd
        objects = [(group, CROWD, 0, 1)] if crowd else []
        for category, mask in enumerate((disc, ring, bar, tile)):
            if crowd or category < 2:
                objects.append((mask, COLOURS[category], category, 0))
        photo, annotations = np.full((*shape, 3), GROUND, np.uint8), []
        for mask, colour, category, iscrowd in objects:
            photo[mask == 1] = colour
            annotations.append(mask_annotation(mask, category, iscrowd))
        dicts.append({"height": shape[0], "width": shape[1], "annotations": annotations})
        dicts[-1]["file_name"] = str(tmp_path / f"photo{len(dicts)}.png")
        cv2.imwrite(dicts[-1]["file_name"], photo[..., ::-1])
    empty = str(tmp_path / "empty.png")
    cv2.imwrite(empty, np.full((120, 180, 3), GROUND, np.uint8))
    dicts.append({"file_name": empty, "height": 120, "width": 180, "annotations": []})
    for i, d in enumerate(dicts):
        d["image_id"] = i
    register_dataset("coloured", lambda: copy.deepcopy(dicts), thing_classes=list("abcd"))
    return dicts


def coloured_cfg(tiny_cfg, *opts):
    return finetune_cfg(tiny_cfg(
        "SSL.ENABLED", "False", "DATASETS.TRAIN", "('coloured',)", "INPUT.FORMAT", "RGB",
        "INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MAX_SIZE_TRAIN", "500", "MODEL.PIXEL_MEAN",
        str(MEAN), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False", *opts))  # fmt: skip


def grown(mask, pixels):
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * pixels + 1,) * 2, np.uint8)) > 0


@pytest.mark.parametrize("crop", [[], ["INPUT.CROP.ENABLED", "True"]], ids=["whole", "crop"])
@pytest.mark.parametrize(
    "opts", [JITTER, PASTE, [*JITTER, *PASTE]], ids=["jitter", "paste", "both"]
)
def test_masks_and_boxes_follow_the_pixels(tiny_cfg, coloured_set, opts, crop):
    """In both directions: inside a mask is its class's colour, and that colour nowhere else."""
    stream = build_finetune_loader(coloured_cfg(tiny_cfg, *opts, *crop)).stream
    seen, most = set(), 0
    for position in range(30):
        item = stream[position]
        image, instances = item["image"].permute(1, 2, 0).numpy(), item["instances"]
        if not len(instances):
            continue
        masks = instances.gt_masks.tensor.numpy()
        assert masks.shape[1:] == image.shape[:2] == instances.image_size
        classes = instances.gt_classes.numpy()
        for mask, category, box in zip(masks, classes, instances.gt_boxes.tensor.tolist()):
            inner = ~grown(np.pad(~mask, 1, constant_values=True), 4)[1:-1, 1:-1]
            assert (np.abs(image[inner] - COLOURS[category]) <= 2).all()
            y, x = mask.nonzero()
            tight = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
            # Where nothing came of pasting, a box is the annotation's.
            assert np.abs(box - tight).max() <= (1 if opts == PASTE else 0)
        for category, colour in enumerate(COLOURS):
            is_colour = (image == colour).all(2)
            stray = is_colour & ~grown(masks[classes == category].any(0), 2)
            # At most what is left of a hidden object.
            assert stray.sum() <= 0.1 * is_colour.size * 0.1, (position, category)
        seen.update(classes.tolist())
        most = max(most, len(instances))
    assert seen == {0, 1, 2, 3}
    assert most > 4 if opts != JITTER else most == 4


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_scale_jitter_keeps_stocks_size(tiny_cfg, coloured_set, factor):
    opts = ["INPUT.RANDOM_FLIP", "none"]
    stock = build_finetune_loader(coloured_cfg(tiny_cfg, *opts)).stream
    jitter = ["SSL.FINETUNE.SCALE_JITTER", f"({factor},{factor})"]
    stream = build_finetune_loader(coloured_cfg(tiny_cfg, *opts, *jitter)).stream
    # In memory as large as the largest scale shows it, up to the photo's own size.
    for d in coloured_set:
        side = min(stream.mapper.read_photo(d["file_name"]).shape[:2])
        assert side == min(120, 96 * max(1, factor))
    corners = set()
    for position in range(12):
        a, b = stock[position], stream[position]
        image, size = b["image"], a["image"].shape[1:]
        assert image.shape[1:] == size == b["instances"].image_size
        h, w = (round(factor * n) for n in size)
        if factor < 1:
            assert (image[:, h:] == torch.tensor(MEAN)[:, None, None]).all()
            assert (image[:, :, w:] == torch.tensor(MEAN)[:, None, None]).all()
        assert not (image[:, :h, :w] == torch.tensor(MEAN)[:, None, None]).all(0).any()
        if factor <= 1:  # nothing is cropped away
            expected = factor * a["instances"].gt_boxes.tensor
            torch.testing.assert_close(b["instances"].gt_boxes.tensor, expected, rtol=0, atol=1)
        else:
            corners.add(tuple(image[:, 0, 0].tolist()))
    assert factor <= 1 or len(corners) > 1  # cropped anywhere


def test_scale_jitter_crops_anywhere():
    """In all four corners, not only along a diagonal."""
    photo = np.zeros((96, 128, 3), np.uint8)
    photo[..., 0], photo[..., 1] = np.arange(128), np.arange(96)[:, None]
    np.random.seed(0)
    jitter = ScaleJitter(T.Resize((96, 128)), 1.5, 1.5, (0, 0, 0))
    seen = np.array([jitter(T.AugInput(photo)).apply_image(photo)[0, 0, :2] for _ in range(200)])
    x, y = (seen / seen.max(0)).T
    for low, high in ((x < 0.25, y > 0.75), (x > 0.75, y < 0.25), (x < 0.25, y < 0.25)):
        assert 5 < (low & high).sum() < 30  # a sixteenth of 200, about


@pytest.mark.parametrize(
    "opts, kind",
    [(JITTER, PolygonMasks), ([*JITTER, "SSL.FINETUNE.COPY_PASTE", "0.5"], BitMasks)],
    ids=["jitter", "paste"],
)
def test_only_pasting_makes_polygons_pixels(tiny_cfg, coloured_set, opts, kind):
    for d in coloured_set:
        d["annotations"] = [a for a in d["annotations"] if isinstance(a["segmentation"], list)]
    stream = build_finetune_loader(coloured_cfg(tiny_cfg, *opts)).stream
    for position in range(9):
        instances = stream[position]["instances"]
        if len(instances):
            assert isinstance(instances.gt_masks, kind)
            boxes = instances.gt_masks.get_bounding_boxes().tensor
            assert torch.equal(instances.gt_boxes.tensor, boxes)


def same(a, b):
    assert a["index"] == b["index"] and torch.equal(a["image"], b["image"])
    assert torch.equal(a["instances"].gt_classes, b["instances"].gt_classes)
    assert len(a["instances"]) == 0 or torch.equal(
        a["instances"].gt_masks.tensor, b["instances"].gt_masks.tensor
    )


def test_augmentation_ends_where_it_is_to(tiny_cfg, coloured_set):
    """Factors up to 1: photos are in memory as large as without."""
    added = ["SSL.FINETUNE.SCALE_JITTER", "(0.5,1.0)", "SSL.FINETUNE.COPY_PASTE", "1.0",
             "SSL.FINETUNE.STRONG", "1.0", "INPUT.MASK_FORMAT", "bitmask"]  # fmt: skip
    cfgs = added, [*added, "SSL.FINETUNE.AUGMENT_UNTIL", "0.6"], added[-2:]
    always, until, never = (
        build_finetune_loader(coloured_cfg(tiny_cfg, "SOLVER.MAX_ITER", "10", *opts)).stream
        for opts in cfgs
    )
    for position in range(0, 12):  # iterations of 2 photos; the first 6 of 10
        same(until[position], always[position])
    for position in range(12, 20):
        same(until[position], never[position])
        assert not torch.equal(until[position]["image"], always[position]["image"])


def test_position_alone_decides_what_is_pasted(tiny_cfg, coloured_set):
    loader = build_finetune_loader(
        coloured_cfg(tiny_cfg, *JITTER, "SSL.FINETUNE.COPY_PASTE", "0.5")
    )
    plain = build_finetune_loader(coloured_cfg(tiny_cfg, *JITTER, "INPUT.MASK_FORMAT", "bitmask"))
    items = [loader.stream[position] for position in range(24)]
    loader.num_workers, loader.start_iter = 2, 4  # as a resumed run
    for i, batch in zip(range(4, 7), loader):
        for slot, item in enumerate(batch):
            same(item, items[2 * i + slot])
    pasted = 0
    for position, item in enumerate(items):
        before = plain.stream[position]
        if torch.equal(item["image"], before["image"]):
            same(item, before)
        else:
            pasted += 1
    assert 4 <= pasted <= 16


def test_a_photo_alone_gives_to_itself(tiny_cfg, coloured_set):
    del coloured_set[1:]
    stream = build_finetune_loader(coloured_cfg(tiny_cfg, *JITTER, *PASTE)).stream
    numbers = [stream[i]["instances"].gt_classes.tolist() for i in range(12)]
    assert max(map(len, numbers)) > 2 and {n for x in numbers for n in x} == {0, 1}


def test_a_photo_without_objects_takes_and_gives_none(tiny_cfg, coloured_set):
    opts = coloured_cfg(tiny_cfg, *PASTE)
    first, _, empty = coloured_set
    with random_state(0):
        taken = DetectionMapper(opts, read_photo, mask_format="bitmask", others=[first])(empty)
    assert set(taken["instances"].gt_classes.tolist()) <= {0, 1} and len(taken["instances"])
    with random_state(0):
        mapper = DetectionMapper(opts, read_photo, mask_format="bitmask", others=[empty])
        kept, none = mapper(first), mapper(empty)
    assert kept["instances"].gt_classes.tolist() == [0, 1] and len(none["instances"]) == 0


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_what_is_pasted_has_a_scale_and_flip_of_its_own(tiny_cfg, coloured_set, factor):
    first, _, empty = coloured_set
    del first["annotations"][1]  # what is left is 20..71 of 180 from the left
    jitter = ["SSL.FINETUNE.SCALE_JITTER", f"({factor},{factor})"]
    mapper = DetectionMapper(coloured_cfg(tiny_cfg, *PASTE, *jitter), read_photo,
                             mask_format="bitmask", others=[first])  # fmt: skip
    ends = set()
    for seed in range(12):
        with random_state(seed):
            left, _, right, _ = mapper(empty)["instances"].gt_boxes.tensor[0].tolist()
        assert right - left == pytest.approx(51 * 0.8 * factor, abs=2)  # 96 px of 120
        ends.add(round(left / 4))
    # The photo is flipped with what it is filled up with.
    assert ends == {round(20 * 0.8 * factor / 4), round((144 - 71 * 0.8 * factor) / 4)}


def test_crowds_are_not_pasted(tiny_cfg, coloured_set):
    _, crowded, empty = coloured_set
    before = copy.deepcopy(crowded)
    mapper = DetectionMapper(
        coloured_cfg(tiny_cfg, *PASTE), read_photo, mask_format="bitmask", others=[crowded]
    )
    counts = set()
    for seed in range(40):
        with random_state(seed):
            item = mapper(empty)
        assert not ((item["image"] - torch.tensor(CROWD)[:, None, None]).abs() < 3).all(0).any()
        counts.add(len(item["instances"]))
    assert counts == {1, 2, 3, 4}  # any number of its objects, and never none
    assert str(crowded) == str(before)


def test_a_photo_at_test_size_is_what_stock_tests_on(tiny_cfg):
    cfg = finetune_cfg(tiny_cfg("SSL.ENABLED", "False", "INPUT.MIN_SIZE_TEST", "45"))
    for d in load_dicts(["balloon_demo_train"])[:2]:
        stock = DatasetMapper(cfg, False)(copy.deepcopy(d))["image"]
        assert stock.shape == (3, 45, 60)
        assert torch.equal(mapper_at_test_size(cfg)(d)["image"], stock)
    assert torch.equal(calibration_batches(cfg, ["balloon_demo_train"], 1)[0][0]["image"],
                       mapper_at_test_size(cfg)(load_dicts(["balloon_demo_train"])[0])["image"]
                       [:, 6:38, 14:46])  # fmt: skip


def test_validation_is_stocks(tiny_cfg, coloured_set):
    for d in coloured_set:
        d["annotations"] = [a for a in d["annotations"] if isinstance(a["segmentation"], list)]
    with_options, stock = (
        build_validation_batches(coloured_cfg(tiny_cfg, *opts), ["coloured"])
        for opts in ([*JITTER, *PASTE], [])
    )
    for (a,), (b,) in zip(with_options, stock):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        assert isinstance(a["instances"].gt_masks, PolygonMasks)


def test_a_detector_learns_from_pasted_objects(tiny_cfg, coloured_set):
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    cfg = coloured_cfg(tiny_cfg, *JITTER, *PASTE, "MODEL.ROI_HEADS.NUM_CLASSES", "4")
    stream = build_finetune_loader(cfg).stream
    torch.manual_seed(0)
    with EventStorage(0):
        losses = build_model(cfg)([stream[0], stream[1]])
    assert all(torch.isfinite(x) for x in losses.values()) and losses["loss_mask"] > 0.5


def test_annotation_of_another_shape_is_refused(tiny_cfg):
    cfg = finetune_cfg(tiny_cfg("SSL.ENABLED", "False"))
    d = dict(load_dicts(["balloon_demo_train"])[0])
    d["height"], d["width"] = d["width"], d["height"]
    with pytest.raises(D2SSLError, match="other proportions"):
        DetectionMapper(cfg, read_photo)(d)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_what_is_hidden_is_painted_in_the_mean_colour(tiny_cfg, coloured_set, image_format):
    cfg = coloured_cfg(tiny_cfg, "INPUT.FORMAT", image_format, "INPUT.RANDOM_FLIP", "none")
    photo = {k: v for k, v in coloured_set[0].items() if k != "annotations"}
    mask = np.zeros((120, 180), np.uint8)
    mask[30:90, 60:120] = 1
    hidden = [mask_annotation(mask, 0, 1)["segmentation"]]
    read = PhotoStore(60).get  # half the size that the mask is for
    plain, painted = (
        DetectionMapper(cfg, read, is_train=False)({**photo, **more})
        for more in ({}, {"hidden": hidden})
    )
    assert "hidden" not in painted
    plain, painted = (x["image"].numpy().transpose(1, 2, 0).astype(int) for x in (plain, painted))
    scale = painted.shape[0] / 120
    inside, outside = np.zeros((2, *painted.shape[:2]), bool)
    top, bottom, left, right = (round(v * scale) for v in (30, 90, 60, 120))
    inside[top + 2 : bottom - 2, left + 2 : right - 2] = True
    outside[top - 2 : bottom + 2, left - 2 : right + 2] = True
    assert (painted[inside] == np.rint(MEAN)).all()
    assert (painted[~outside] == plain[~outside]).all() and (plain[inside] != np.rint(MEAN)).any()


@pytest.mark.parametrize("key", ["SSL.FINETUNE.STRONG", "SSL.SELF_TRAINING.STRONG"])
def test_strong_photos_look_different_and_show_the_same_objects(tiny_cfg, coloured_set, key):
    """Of each kind, a person's labels and the detector's own, only those that are asked for."""
    off = ["SSL.SELF_TRAINING.STRONG", "0.0", "INPUT.RANDOM_FLIP", "none"]
    cfgs = [coloured_cfg(tiny_cfg, *off, key, share) for share in ("1.0", "0.0")]
    for photo, own in ((coloured_set[0], False), ({**coloured_set[0], "hidden": []}, True)):
        changed = []
        for seed in range(8):
            examples = []
            for cfg in cfgs:
                with random_state(0, seed):
                    examples.append({**DetectionMapper(cfg, read_photo)(photo), "index": seed})
            strong, plain = examples
            changed.append((strong["image"] != plain["image"]).float().mean())
            plain["image"] = strong["image"]
            same(strong, plain)
        assert np.mean(changed) > 0.5 if own == ("SELF" in key) else not any(changed)
        tests = [DetectionMapper(cfg, read_photo, is_train=False)(photo)["image"] for cfg in cfgs]
        assert torch.equal(*tests)


def strong_photos(tiny_cfg, coloured_set, *opts):
    """60 of them: the image, H x W x 3, which pixels are cut out, and the instances."""
    cfg = coloured_cfg(tiny_cfg, "SSL.FINETUNE.STRONG", "1.0", *opts)
    mapper = DetectionMapper(cfg, read_photo, mask_format="bitmask", others=coloured_set[1:2])
    for seed in range(60):
        with random_state(0, seed):
            example = mapper(coloured_set[0])
        image = example["image"].permute(1, 2, 0).numpy()
        yield image, (image == np.rint(cfg.MODEL.PIXEL_MEAN)).all(2), example["instances"]


@pytest.mark.parametrize("opts", [["INPUT.FORMAT", "BGR"], ["MODEL.PIXEL_MEAN", "(9.6,120,231)"]])
def test_squares_are_cut_out_of_strong_objects(tiny_cfg, coloured_set, opts):
    shares = [
        cut.sum() / float(instances.gt_boxes.area().sum())
        for _, cut, instances in strong_photos(tiny_cfg, coloured_set, *opts)
    ]
    # Half of the objects lose 0.1 to 0.3 of their box, less where the square reaches out of the
    # photo: of two objects none in a quarter of all cases, both in another.
    assert 5 <= shares.count(0) <= 25 and 0.06 < np.mean(shares) < 0.12 and max(shares) <= 0.31


def test_what_is_pasted_into_a_strong_photo_looks_as_it_does(tiny_cfg, coloured_set):
    """A fifth is grey: then everything is."""
    grey = []
    for image, cut, instances in strong_photos(tiny_cfg, coloured_set, *PASTE):
        objects = instances.gt_masks.tensor.any(0).numpy() & ~cut
        share = (np.ptp(image[objects], axis=1) == 0).mean()
        assert share > 0.99 or share < 0.01
        grey.append(share > 0.5)
    assert 4 <= sum(grey) <= 22
