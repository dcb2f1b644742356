import copy
import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances

from d2ssl.data.datasets import register_dataset
from d2ssl.data.masks import mask_annotation
from d2ssl.engine.coco import build_evaluator, flatten


def square(x, side):
    corners = [x, x, x + side, x, x + side, x + side, x, x + side]
    return {"bbox": [x, x, x + side, x + side], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0,
            "segmentation": [[float(c) for c in corners]], "iscrowd": 0}  # fmt: skip


def predict(x, side):
    found = Instances((100, 100))
    found.pred_boxes = Boxes(torch.tensor([[x, x, x + side, x + side]], dtype=torch.float32))
    found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    mask = np.zeros((1, 100, 100), bool)
    mask[0, x : x + side, x : x + side] = True
    found.pred_masks = BitMasks(torch.from_numpy(mask)).tensor
    return {"instances": found}


def ap(name, output_dir, prediction):
    evaluator = build_evaluator(name, str(output_dir))
    evaluator.reset()
    evaluator.process([{"image_id": 0, "height": 100, "width": 100}], [prediction])
    return flatten(evaluator.evaluate())


@pytest.fixture
def squares():
    """A one-photo set whose label the test may change; yields (name, dicts)."""
    dicts = [{"file_name": "a.jpg", "image_id": 0, "height": 100, "width": 100,
              "annotations": [square(10, 60)]}]  # fmt: skip
    register_dataset("squares", lambda: copy.deepcopy(dicts), thing_classes=["square"],
                     evaluator_type="coco")  # fmt: skip
    yield "squares", dicts
    DatasetCatalog.remove("squares")


def test_perfect_and_hopeless(squares, tmp_path):
    name, _ = squares
    assert ap(name, tmp_path, predict(10, 60))["segm/AP"] == pytest.approx(100)
    assert ap(name, tmp_path, predict(71, 20))["segm/AP"] == 0


def test_open_images_has_the_ap_of_its_challenge_beside_coco_s(tmp_path):
    """A box around a group is no object for COCO's AP, and one to be found for the challenge's."""
    above = {"LabelName": "/m/entity", "Subcategory": [{"LabelName": "/m/square"}]}
    (tmp_path / "hierarchy.json").write_text(json.dumps(above))
    group = {**square(10, 60), "iscrowd": 1, "is_group_of": True}
    dicts = [{"file_name": "a.jpg", "image_id": 0, "height": 100, "width": 100,
              "annotations": [square(71, 20), group],
              "positive_labels": [0], "negative_labels": []}]  # fmt: skip
    register_dataset("open_squares", lambda: copy.deepcopy(dicts), thing_classes=["square"],
                     mids=["/m/square"], hierarchy_file=str(tmp_path / "hierarchy.json"),
                     evaluator_type="coco")  # fmt: skip
    found = ap("open_squares", tmp_path, predict(71, 20))
    DatasetCatalog.remove("open_squares")
    assert found["segm/AP50"] == pytest.approx(100)
    assert found["open_images_segm/AP50"] == pytest.approx(100)
    assert found["open_images_bbox/AP50"] == pytest.approx(50)


def test_corrected_labels_are_seen_in_the_same_output_folder(squares, tmp_path):
    name, dicts = squares
    assert ap(name, tmp_path, predict(10, 60))["bbox/AP"] == pytest.approx(100)
    dicts[0]["annotations"] = [square(40, 50)]
    assert ap(name, tmp_path, predict(40, 50))["bbox/AP"] == pytest.approx(100)
    assert ap(name, tmp_path, predict(10, 60))["bbox/AP"] == 0


def test_run_length_ground_truth_with_holes_and_crowds(tmp_path):
    """Perfect only with the hole; what is found in a crowd counts neither way."""
    ring, crowd = np.zeros((100, 100), bool), np.zeros((100, 100), bool)
    ring[10:50, 10:50] = True
    full = ring.copy()
    ring[20:40, 20:40] = False
    crowd[60:, 60:] = True
    labels = [mask_annotation(ring, 0), mask_annotation(crowd, 0, iscrowd=1)]
    assert all(isinstance(a["segmentation"]["counts"], bytes) for a in labels)
    dicts = [{"file_name": "a.jpg", "image_id": 0, "height": 100, "width": 100,
              "annotations": labels}]  # fmt: skip
    register_dataset("rings", lambda: dicts, thing_classes=["ring"], evaluator_type="coco")
    small = np.zeros((100, 100), bool)
    small[70:80, 70:80] = True

    def found(first):
        instances = Instances((100, 100))
        boxes = torch.tensor([[70, 70, 80, 80], [10, 10, 50, 50]], dtype=torch.float32)
        instances.pred_boxes, instances.scores = Boxes(boxes), torch.tensor([0.9, 0.8])
        instances.pred_classes = torch.zeros(2, dtype=torch.int64)
        instances.pred_masks = torch.from_numpy(np.stack([small, first]))
        return {"instances": instances}

    for _ in range(2):  # the conversion changes the labels that it is given
        assert ap("rings", tmp_path, found(ring))["segm/AP"] == pytest.approx(100)
    # 1200 of 1600 pixels: an IoU of 0.75, right at six of the ten thresholds.
    assert ap("rings", tmp_path, found(full))["segm/AP"] == pytest.approx(60)


def test_flatten_leaves_out_nan():
    assert flatten({"segm": {"AP": 1.5, "APs": math.nan}}) == {"segm/AP": 1.5}
