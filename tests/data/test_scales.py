"""Sizes of objects: against drawn views, Detectron2's own resizing, and its pooler."""

import numpy as np
import pytest
from detectron2.data import transforms as T

from d2ssl.config import pretrain_cfg
from d2ssl.data.scales import finetune_scale, fpn_levels, view_scales
from d2ssl.data.views import View, apply_boxes, draw_view
from d2ssl.modeling.trunk import Trunk
from d2ssl.report.dataset_page import pretrain_canonical_size


def test_levels_of_the_pyramid():
    """floor(4 + log2(size / 224)), within 2 to 5: each level begins at half the next one's."""
    sides = [1, 111.9, 112, 223.9, 224, 447.9, 448, 5000]
    assert fpn_levels(sides).tolist() == [2, 2, 3, 3, 4, 4, 5, 5]
    assert fpn_levels(np.array(sides) / 4, 56).tolist() == [2, 2, 3, 3, 4, 4, 5, 5]
    assert fpn_levels([]).tolist() == []


def test_pretraining_scales_the_rule_as_the_trunk_does(tiny_cfg):
    for size in (64, 96):
        cfg = tiny_cfg("SSL.INPUT.VIEW_SIZE", size)
        pooler = Trunk.from_config(pretrain_cfg(cfg), view_size=size)["box_pooler"]
        assert pretrain_canonical_size(cfg) == pooler.canonical_box_size
        level = pooler.max_level - pooler.min_level + 1
        assert (pooler.min_level, level, pooler.canonical_level) == (2, 4, 4)


@pytest.mark.parametrize("height, width", [(480, 640), (640, 480), (300, 1200), (500, 500)])
def test_fine_tuning_scales_as_detectron2_does(height, width):
    image = np.zeros((height, width, 3), np.uint8)
    scaled = T.ResizeShortestEdge(512, 800, "choice").get_transform(image).apply_image(image)
    expected = np.sqrt(scaled.shape[0] * scaled.shape[1] / (height * width))
    assert finetune_scale(np.array([[height, width]]), 512, 800) == pytest.approx([expected])


def test_fine_tuning_without_scaling():
    assert finetune_scale(np.array([[480, 640], [10, 20]]), 0, 800).tolist() == [1, 1]
    assert finetune_scale(np.zeros((0, 2)), 512, 800).shape == (0,)


@pytest.mark.parametrize("crop_scale", [(0.2, 0.6), None])
def test_views_scale_as_they_are_drawn(crop_scale):
    """On a square photo, where such crops always fit."""
    view = View(size=64, crop_scale=crop_scale, jitter_p=0, blur_p=0)
    photo, box = np.zeros((200, 200, 3), np.uint8), np.array([[50.0, 60, 90, 140]])
    np.random.seed(0)
    drawn = []
    for _ in range(400):
        x1, y1, x2, y2 = apply_boxes(draw_view(view, photo)[1], box)[0]
        drawn.append(np.sqrt((x2 - x1) * (y2 - y1) / (40 * 80)))
    scales = view_scales(view, np.array([[200, 200]]))
    assert scales.shape == (1, 16)
    for q in (0.1, 0.5, 0.9):
        assert np.quantile(scales, q) == pytest.approx(np.quantile(drawn, q), rel=0.06)
