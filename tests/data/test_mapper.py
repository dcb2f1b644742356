import copy

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper

from d2ssl.config import finetune_cfg, pretrain_cfg
from d2ssl.data.build import build_pretrain_loader, load_dicts
from d2ssl.data.loader import random_state
from d2ssl.data.mapper import DetectionMapper, PretextMapper, to_tensor
from d2ssl.data.photos import PhotoStore, read_photo
from d2ssl.data.views import View
from d2ssl.errors import D2SSLError

PLAIN = dict(crop_scale=None, flip=0, jitter_p=0, gray=0, blur_p=0, solarize_p=0)


def mapper_of_plain_views(cfg, read=read_photo, **kwargs):
    views = [View(size=64, **{**PLAIN, **kwargs})]
    return PretextMapper(cfg, read, views, [])


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_pretraining_normalises_as_the_stock_detector(tiny_cfg, image_format):
    """One photo through the mapper and method, and through Detectron2's own mapper and model."""
    from detectron2.modeling import build_model

    cfg = tiny_cfg("INPUT.FORMAT", image_format, "MODEL.PIXEL_STD", "(50., 60., 70.)")
    dicts = load_dicts(["balloon_demo_train"])[:2]
    item = mapper_of_plain_views(cfg)(dicts[0])
    method = build_model(pretrain_cfg(cfg))
    ours = method.stack_view([item], 0)[0]

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
    mapper = PretextMapper(cfg, PhotoStore(100).get, views, [(0, 1)])
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
    cfg = pretrain_cfg(tiny_cfg("SSL.INPUT.CUTOUT_PROB", "1.0"))
    from d2ssl.modeling.methods import find_method

    method = find_method("SoCo")
    loader = build_pretrain_loader(cfg, method.views(cfg), method.view_pairs)
    item = loader.stream[0]
    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).round().view(3, 1, 1)
    assert (item["views"][1].float() - mean).abs().le(1).all(0).float().mean() > 0.02
    assert (item["views"][0].float() - mean).abs().le(1).all(0).float().mean() < 0.02


def test_no_annotation_reaches_pretraining(tiny_cfg):
    cfg = pretrain_cfg(tiny_cfg("SSL.DATASETS", "('balloon_demo_train',)"))
    from d2ssl.modeling.methods import find_method

    method = find_method("SoCo")
    stream = build_pretrain_loader(cfg, method.views(cfg), method.view_pairs).stream
    assert not any("annotations" in d for d in stream.dicts)
    assert set(stream[0]) == {"image_id", "pairs", "views", "index", "position"}


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


def test_annotation_of_another_shape_is_refused(tiny_cfg):
    cfg = finetune_cfg(tiny_cfg("SSL.ENABLED", "False"))
    d = dict(load_dicts(["balloon_demo_train"])[0])
    d["height"], d["width"] = d["width"], d["height"]
    with pytest.raises(D2SSLError, match="other proportions"):
        DetectionMapper(cfg, read_photo)(d)
