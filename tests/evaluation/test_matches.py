"""Against pycocotools on data sets in which photos really appear several times."""

import copy
import io
import json
from contextlib import redirect_stdout

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2ssl.evaluation.matches import Matches, match

PHOTOS = 6


def coco(content):
    found = COCO()
    found.dataset = content
    with redirect_stdout(io.StringIO()):
        found.createIndex()
    return found


@pytest.fixture(scope="module")
def scene():
    """Ground truth with two categories, a crowd and a photo without objects; predictions near it,
    some doubled, some of nothing."""
    random = np.random.default_rng(3)
    annotations, predictions = [], []

    def box(x, y, w, h):
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        return {"bbox": [x, y, w, h], "area": w * h, "segmentation": [corners]}

    for photo in range(PHOTOS):
        for _ in range(0 if photo == 2 else 5):
            x, y, w, h = map(float, random.uniform(10, 60, 4))
            category, crowd = int(random.integers(1, 3)), int(random.uniform() < 0.15)
            common = {"image_id": photo + 10, "category_id": category}
            annotations.append(
                {**common, **box(x, y, w, h), "iscrowd": crowd, "id": len(annotations) + 1}
            )
            for _ in range(int(random.integers(0, 4))):
                shift = random.normal(0, 5, 4)
                shifted = box(x + shift[0], y + shift[1], w + abs(shift[2]), h + abs(shift[3]))
                predictions.append({**common, **shifted, "score": float(random.uniform())})
        nothing = {"image_id": photo + 10, "category_id": 1, **box(80.0, 80.0, 15.0, 15.0)}
        predictions.append({**nothing, "score": float(random.uniform(0, 0.6))})
    content = {
        "images": [{"id": i + 10, "height": 130, "width": 130} for i in range(PHOTOS)],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": annotations,
    }
    return content, predictions


def by_pycocotools(content, predictions, task, times):
    """AP where photo i appears ``times[i]`` times."""
    many = {**content, "images": [], "annotations": []}
    found = []
    for i, image in enumerate(content["images"]):
        for copy_ in range(times[i]):
            image_id = 1000 * (copy_ + 1) + image["id"]
            many["images"].append({**image, "id": image_id})
            for source, target in ((content["annotations"], many["annotations"]),
                                   (predictions, found)):  # fmt: skip
                target += [{**a, "image_id": image_id} for a in source
                           if a["image_id"] == image["id"]]  # fmt: skip
    for i, annotation in enumerate(many["annotations"]):
        annotation["id"] = i + 1
    truth = coco(copy.deepcopy(many))
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(found)), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats[0]


CHOICES = [
    [1] * PHOTOS,
    [2, 0, 1, 3, 0, 1],
    [0, 4, 0, 0, 1, 2],
    [0, 0, 0, 1, 0, 0],
    [1, 1, 3, 1, 0, 2],
]


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_ap_of_any_choice_of_photos_is_that_of_pycocotools(scene, task):
    content, predictions = scene
    if task == "segm":
        predictions = with_masks(content, predictions)
    matches = match(coco(copy.deepcopy(content)), predictions, task)
    expected = [by_pycocotools(content, predictions, task, times) for times in CHOICES]
    assert len(set(np.round(expected, 3))) == len(CHOICES)
    np.testing.assert_allclose(matches.ap(np.array(CHOICES)), expected, atol=1e-9)


def with_masks(content, predictions):
    """As ``COCOEvaluator`` keeps them: a box and a compressed mask."""
    truth = coco(copy.deepcopy(content))
    size = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    found = []
    for p in predictions:
        height, width = size[p["image_id"]]
        truth.imgs[p["image_id"]].update(height=height, width=width)
        found.append({**p, "segmentation": truth.annToRLE({**p, "id": 1})})
    return found


def test_a_photo_without_objects_alone_has_no_ap(scene):
    content, predictions = scene
    matches = match(coco(copy.deepcopy(content)), predictions, "bbox")
    assert np.isnan(matches.ap(np.eye(PHOTOS, dtype=int)[2:3]))[0]


def test_each_photo_is_what_it_is_alone(scene):
    content, predictions = scene
    matches = match(coco(copy.deepcopy(content)), predictions, "bbox")
    np.testing.assert_allclose(matches.each_photo(), matches.ap(np.eye(PHOTOS, dtype=int)))


def test_above_a_score_is_what_fewer_predictions_give(scene):
    content, predictions = scene
    kept = [p for p in predictions if p["score"] >= 0.4]
    matches = match(coco(copy.deepcopy(content)), predictions, "bbox").above(0.4)
    assert matches.ap(np.ones((1, PHOTOS), int))[0] == pytest.approx(
        by_pycocotools(content, kept, "bbox", [1] * PHOTOS)
    )


def test_counts_of_a_scene_by_hand():
    """Two objects; one found twice, a wrong one beside it: 1 right, 2 wrong of 2."""
    square = lambda x: {"bbox": [x, 0.0, 10.0, 10.0], "area": 100.0}  # noqa: E731
    truth = coco(
        {
            "images": [{"id": 1, "height": 50, "width": 90}],
            "categories": [{"id": 1, "name": "a"}],
            "annotations": [
                {"id": i + 1, "image_id": 1, "category_id": 1, "iscrowd": 0, **square(40.0 * i)}
                for i in range(2)
            ],
        }
    )
    found = [{"image_id": 1, "category_id": 1, "score": s, **square(x)}
             for s, x in ((0.9, 0.0), (0.8, 1.0), (0.7, 70.0))]  # fmt: skip
    matches = match(truth, found, "bbox")
    assert matches.counts() == {"right": 1, "wrong": 2, "objects": 2}
    assert matches.above(0.75).counts() == {"right": 1, "wrong": 1, "objects": 2}
    # Precision 1 up to a recall of one half: 51 of 101 recalls, at all ten IoUs.
    assert matches.ap(np.array([[1]]))[0] == pytest.approx(100 * 51 / 101)


def test_no_detection_at_all(scene):
    matches = match(coco(copy.deepcopy(scene[0])), [], "segm")
    assert matches.ap(np.ones((2, PHOTOS), int)).tolist() == [0, 0]
    assert matches.counts()["right"] == 0 < matches.counts()["objects"]


def test_json_keeps_everything(scene):
    content, predictions = scene
    matches = match(coco(copy.deepcopy(content)), predictions, "bbox")
    again = Matches.from_json(json.loads(json.dumps(matches.to_json())))
    for name, value in vars(matches).items():
        np.testing.assert_allclose(vars(again)[name], value, atol=1e-6, err_msg=name)
    empty = match(coco(copy.deepcopy(content)), [], "bbox")
    again = Matches.from_json(json.loads(json.dumps(empty.to_json())))
    assert again.ap(np.ones((1, PHOTOS), int)).tolist() == [0]
