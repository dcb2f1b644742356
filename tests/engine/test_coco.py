import copy
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances

from d2ssl.data.datasets import register_dataset
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


def test_corrected_labels_are_seen_in_the_same_output_folder(squares, tmp_path):
    name, dicts = squares
    assert ap(name, tmp_path, predict(10, 60))["bbox/AP"] == pytest.approx(100)
    dicts[0]["annotations"] = [square(40, 50)]
    assert ap(name, tmp_path, predict(40, 50))["bbox/AP"] == pytest.approx(100)
    assert ap(name, tmp_path, predict(10, 60))["bbox/AP"] == 0


def test_flatten_leaves_out_nan():
    assert flatten({"segm": {"AP": 1.5, "APs": math.nan}}) == {"segm/AP": 1.5}
