"""Labels and predictions: drawn where they are, and which of them."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from PIL import Image

from d2ssl.config import finetune_cfg, get_cfg
from d2ssl.data.datasets.catalog import register_dataset
from d2ssl.data.masks import encode
from d2ssl.engine.self_training import write_labels
from d2ssl.report.pictures import compare_predictions, predictions_file, show_own_labels


@pytest.fixture
def test_photos(tmp_path):
    """Three grey photos of 200 x 100 px with a label each; categories have ids 40 and 70."""
    dicts = []
    for i in range(3):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (200, 100), (90, 90, 90)).save(path)
        label = {
            "bbox": [20, 20, 60, 60],
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": 1,
            "segmentation": [[20, 20, 60, 20, 60, 60, 20, 60]],
        }
        dicts.append({"file_name": str(path), "image_id": f"photo {i}", "height": 100, "width": 200,
                      "annotations": [label]})  # fmt: skip
    name = "report_pictures_test"
    register_dataset(name, lambda: dicts, thing_classes=["cat", "dog"],
                     thing_dataset_id_to_contiguous_id={40: 0, 70: 1})  # fmt: skip
    cfg = get_cfg()
    cfg.DATASETS.TEST = (name,)
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    yield finetune_cfg(cfg)
    DatasetCatalog.remove(name)


def test_predictions_beside_labels(test_photos, tmp_path):
    (tmp_path / "output" / "finetune" / "inference").mkdir(parents=True)
    sure = {"image_id": "photo 1", "category_id": 70, "bbox": [100, 20, 40, 40], "score": 0.9}
    unsure = {**sure, "bbox": [150, 60, 20, 20], "score": 0.4}
    with open(predictions_file(test_photos), "w") as file:
        json.dump([sure, unsure], file)
    shown = compare_predictions(test_photos, num_photos=2, side=400)
    assert [x.name for x in shown] == ["0.png", "1.png"]
    assert [(x.num_labels, x.num_predictions) for x in shown] == [(1, 0), (1, 1)]
    image = shown[1].image.astype(int)
    assert image.shape == (200, 2 * 400 + 8, 3)
    grey = np.array([90, 90, 90])
    label, plain = image[80, 80], image[80, 240]  # photo pixels (40, 40) and (120, 40)
    assert np.abs(label - grey).max() > 30 and np.abs(plain - grey).max() <= 2
    # right half: the box drawn at x = 100 .. 140, its left side at 2 * 100; the unsure one is not
    assert np.abs(image[80, 408 + 198 : 408 + 203] - grey).max() > 30
    assert np.abs(image[120:160, 408 + 300] - grey).max() <= 2


def test_own_labels_in_colour_and_what_is_hidden_in_grey(test_photos, tmp_path):
    """Nine photos; on two of them a square that is sure, on one of these one more that is not."""

    def square(x, iscrowd):
        mask = np.zeros((100, 200), np.uint8)
        mask[40:60, x : x + 20] = 1
        rle = encode(mask)
        return {"category_id": 0, "bbox": [x, 40, 20, 20], "score": 0.9, "iscrowd": iscrowd,
                "segmentation": {**rle, "counts": rle["counts"].decode()}}  # fmt: skip

    name, path = test_photos.DATASETS.TEST[0], str(tmp_path / "labels.json")
    labels = [[square(40, 0)], [square(40, 0), square(140, 1)], *[[]] * 7]
    write_labels(path, DatasetCatalog.get(name) * 3, labels, ["cat", "dog"])
    shown, counts = show_own_labels(path, name)
    assert counts == (2, 9, 2)  # photos with an object, photos, objects
    assert [(x.sure, x.unsure) for x in shown] == [(1, 0), (1, 1), *[(0, 0)] * 6]
    image, scale = shown[1].image.astype(int), shown[1].image.shape[1] / 200
    sure, unsure, plain = (image[int(57 * scale), int(x * scale)] for x in (43, 150, 100))
    assert np.ptp(sure) > 30
    assert unsure == pytest.approx(128, abs=2) and plain == pytest.approx(90, abs=2)
