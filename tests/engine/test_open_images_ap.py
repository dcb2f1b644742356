"""The challenge's AP by hand: one photo or two of 100x100, objects and detections are rectangles.

All areas are whole pixels, so that each IoU is a fraction that can be read off.
"""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances

from d2ssl.data.datasets import register_dataset
from d2ssl.data.masks import encode
from d2ssl.engine.open_images_ap import OpenImagesEvaluator
from d2ssl.errors import D2SSLError

SIDE = 100
NAMES = ("Animal", "Dog", "Cat", "Car")
ANIMAL, DOG, CAT, CAR = range(4)
BOTH = pytest.mark.parametrize("task", ["segm", "bbox"])


def node(name, *children):
    return {"LabelName": name, "Subcategory": list(children)}


HIERARCHY = node("Entity", node("/Animal", node("/Dog"), node("/Cat")), node("/Car"))


def mask_of(box):
    x1, y1, x2, y2 = box
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def thing(place, box, masked=True, group=False):
    return {
        "bbox": [*box],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": place,
        "segmentation": encode(mask_of(box)),
        "iscrowd": int(not masked),
        "is_group_of": group,
    }


def group(place, box):
    return thing(place, box, masked=False, group=True)


def image(*things, present=(), absent=()):
    return {
        "height": SIDE,
        "width": SIDE,
        "annotations": list(things),
        "positive_labels": list(present),
        "negative_labels": list(absent),
    }


def instances(*detections):
    """Detections are (class, score, box)."""
    found = Instances((SIDE, SIDE))
    boxes = torch.tensor([box for _, _, box in detections], dtype=torch.float32)
    found.pred_boxes = Boxes(boxes.reshape(-1, 4))
    found.scores = torch.tensor([score for _, score, _ in detections])
    found.pred_classes = torch.tensor([place for place, _, _ in detections], dtype=torch.int64)
    masks = [mask_of(box) for _, _, box in detections]
    found.pred_masks = torch.from_numpy(np.array(masks, bool).reshape(-1, SIDE, SIDE))
    return found


def evaluator(tmp_path, images, **kwargs):
    path = tmp_path / "hierarchy.json"
    path.write_text(json.dumps(HIERARCHY))
    dicts = [{"image_id": i, "file_name": f"{i}.jpg", **image} for i, image in enumerate(images)]
    register_dataset(
        "hand_made",
        lambda: dicts,
        thing_classes=list(NAMES),
        mids=[f"/{name}" for name in NAMES],
        hierarchy_file=str(path),
    )
    return OpenImagesEvaluator("hand_made", **kwargs)


@pytest.fixture
def ap(tmp_path):
    """(task, images, detections of each) -> {"": mean, "Dog": ...} as parts of 1."""

    def run(task, images, detections, **kwargs):
        judge = evaluator(tmp_path, images, tasks=(task,), **kwargs)
        for i, found in enumerate(detections):
            judge.process([{"image_id": i}], [{"instances": instances(*found)}])
        results = judge.evaluate()
        assert list(results) == [f"open_images_{task}"]
        return {key[5:]: value / 100 for key, value in results[f"open_images_{task}"].items()}

    return run


A, B, C, D = (0, 0, 20, 20), (40, 0, 60, 20), (0, 40, 20, 60), (40, 40, 60, 60)
NOWHERE = (80, 80, 95, 95)


@BOTH
def test_a_perfect_detector(ap, task):
    images = [image(thing(DOG, A), thing(DOG, B), thing(CAR, C)), image(thing(CAT, D))]
    found = [
        [(DOG, 0.9, A), (DOG, 0.2, B), (CAR, 0.5, C), (ANIMAL, 0.9, A), (ANIMAL, 0.3, B)],
        [(CAT, 0.8, D), (ANIMAL, 0.7, D)],
    ]
    assert ap(task, images, found) == {"": 1, "Animal": 1, "Dog": 1, "Cat": 1, "Car": 1}


@BOTH
def test_precision_over_recall(ap, task):
    # Best first: wrong, right, wrong, right, of 4 cars. Precision at the hits 1/2 and 2/4, and a
    # quarter of recall each: (1/2 + 1/2) / 4.
    images = [image(*(thing(CAR, box) for box in (A, B, C, D)))]
    found = [[(CAR, 0.9, NOWHERE), (CAR, 0.8, A), (CAR, 0.7, (70, 0, 80, 9)), (CAR, 0.6, B)]]
    assert ap(task, images, found)["Car"] == pytest.approx(1 / 4)
    # Wrong, right, right: 1/2 and 2/3; precision must not rise with recall, so 2/3 twice.
    found = [[(CAR, 0.9, NOWHERE), (CAR, 0.8, A), (CAR, 0.7, B)]]
    assert ap(task, images, found)["Car"] == pytest.approx((2 / 3 + 2 / 3) / 4)


@BOTH
def test_scores_are_ranked_over_all_photos(ap, task):
    # 0.9 wrong (second photo), 0.8 right (first), of 2 cars.
    images = [image(thing(CAR, A)), image(thing(CAR, B))]
    found = [[(CAR, 0.8, A)], [(CAR, 0.9, NOWHERE)]]
    assert ap(task, images, found)["Car"] == pytest.approx(1 / 2 / 2)


@BOTH
@pytest.mark.parametrize(
    "box, hit",
    [
        ((0, 0, 10, 20), True),  # IoU 200 / 400, just enough
        ((0, 0, 9, 20), False),  # 180 / 400
        ((0, 0, 40, 20), True),  # 400 / 800
        ((0, 0, 41, 20), False),  # 400 / 820
    ],
)
def test_an_overlap_of_half_is_enough(ap, task, box, hit):
    assert ap(task, [image(thing(CAR, A))], [[(CAR, 0.5, box)]])["Car"] == hit


@BOTH
def test_the_second_detection_of_an_object_is_wrong(ap, task):
    # The better one is right, the second one wrong, a third finds the other car: 1/1 and 2/3.
    found = [[(CAR, 0.8, (0, 0, 19, 20)), (CAR, 0.7, A), (CAR, 0.6, B)]]
    images = [image(thing(CAR, A), thing(CAR, B))]
    assert ap(task, images, found)["Car"] == pytest.approx((1 + 2 / 3) / 2)


@BOTH
def test_objects_count_for_the_classes_above(ap, task):
    # 2 dogs and a cat are 3 animals. "Animal" finds one of them, and "Dog" does not count for it.
    images = [image(thing(DOG, A), thing(DOG, B), thing(CAT, C))]
    found = [[(DOG, 0.9, A), (ANIMAL, 0.8, C)]]
    values = ap(task, images, found)
    assert values["Dog"] == pytest.approx(1 / 2) and values["Cat"] == 0
    assert values["Animal"] == pytest.approx(1 / 3)
    assert math.isnan(values["Car"])  # none to be found, and left out of the mean:
    assert values[""] == pytest.approx((1 / 2 + 0 + 1 / 3) / 3)
    # When detections count for the classes above as well, two animals are found.
    assert ap(task, images, found, expand_predictions=True)["Animal"] == pytest.approx(2 / 3)


@BOTH
def test_classes_that_are_not_verified_are_ignored(ap, task):
    # The car that is found in the second photo may well be there: nobody looked.
    found = [[(CAR, 0.5, A)], [(CAR, 0.9, B)]]
    assert ap(task, [image(thing(CAR, A)), image(present=[DOG])], found)["Car"] == 1
    # Labelled as absent or as present (and without object), it is wrong: precision 1/2.
    assert ap(task, [image(thing(CAR, A)), image(absent=[CAR])], found)["Car"] == 1 / 2
    assert ap(task, [image(thing(CAR, A)), image(present=[CAR])], found)["Car"] == 1 / 2


@BOTH
@pytest.mark.parametrize(
    "labels, wrong",
    [
        ({"absent": [ANIMAL]}, {"Dog", "Animal"}),  # then no dog either
        ({"absent": [DOG]}, {"Dog"}),  # but perhaps another animal
        ({"absent": [CAT]}, set()),
        ({"present": [DOG]}, {"Dog", "Animal"}),  # a dog is an animal
        ({"present": [ANIMAL]}, {"Animal"}),  # perhaps a dog
    ],
)
def test_labels_spread_over_the_hierarchy(ap, task, labels, wrong):
    images = [image(thing(DOG, A)), image(**labels)]
    found = [[(DOG, 0.5, A), (ANIMAL, 0.5, A)], [(DOG, 0.9, B), (ANIMAL, 0.9, B)]]
    values = ap(task, images, found)
    assert {name for name in ("Dog", "Animal") if values[name] == 1 / 2} == wrong
    assert {name for name in ("Dog", "Animal") if values[name] == 1} == {"Dog", "Animal"} - wrong


# Half of the second detection or more lies inside the group, less than half of the last.
CROWD = (40, 40, 100, 100)
INSIDE = [(CAR, 0.9, (40, 40, 50, 50)), (CAR, 0.8, (30, 50, 50, 60)), (CAR, 0.7, (60, 60, 99, 99))]
BESIDE = (CAR, 0.6, (29, 80, 50, 90))


def test_masks_inside_a_group_are_ignored(ap):
    images = [image(thing(CAR, A), group(CAR, CROWD))]
    assert ap("segm", images, [[*INSIDE, (CAR, 0.5, A)]])["Car"] == 1
    # 10 of its 21 columns are inside: wrong, and better than the one that is right.
    assert ap("segm", images, [[*INSIDE, BESIDE, (CAR, 0.5, A)]])["Car"] == 1 / 2
    # The group is no object of its own.
    assert math.isnan(ap("segm", [image(group(CAR, CROWD))], [INSIDE])["Car"])


def test_the_best_box_inside_a_group_finds_it(ap):
    images = [image(thing(CAR, A), group(CAR, CROWD))]  # 2 objects
    assert ap("bbox", images, [[*INSIDE, (CAR, 0.5, A)]])["Car"] == 1
    # Best first: group (0.9), wrong (0.6), right (0.5): 1/1 and 2/3.
    found = [[*INSIDE, BESIDE, (CAR, 0.5, A)]]
    assert ap("bbox", images, found)["Car"] == pytest.approx((1 + 2 / 3) / 2)
    # A group that nothing finds is missed.
    assert ap("bbox", images, [[(CAR, 0.5, A)]])["Car"] == 1 / 2


@BOTH
def test_an_object_inside_a_group_comes_first(ap, task):
    inside = (50, 50, 60, 60)
    images = [image(thing(CAR, inside), group(CAR, CROWD))]
    value = ap(task, images, [[(CAR, 0.9, inside)]])["Car"]
    assert value == {"segm": 1, "bbox": 1 / 2}[task]  # the group is another box to be found


def test_an_object_without_a_mask(ap):
    # Found by its box, the first detection is ignored; the second one of it is wrong.
    images = [image(thing(CAR, A), thing(CAR, B, masked=False))]
    found = [[(CAR, 0.9, B), (CAR, 0.5, A)]]
    assert ap("segm", images, found)["Car"] == 1
    again = [[(CAR, 0.9, B), (CAR, 0.8, (40, 0, 59, 20)), (CAR, 0.5, A)]]
    assert ap("segm", images, again)["Car"] == 1 / 2
    # One that found an object with a mask leaves the other object (IoU 300 / 500) to the next.
    low = (0, 5, 20, 25)
    images_close = [image(thing(CAR, A), thing(CAR, low, masked=False), thing(CAR, C))]
    assert ap("segm", images_close, [[(CAR, 0.9, A), (CAR, 0.8, low), (CAR, 0.5, C)]])["Car"] == 1
    # As a box it is an object like others: 1/1, 1/1 of 2, and with the second one 1/1, 2/3.
    assert ap("bbox", images, found)["Car"] == 1
    assert ap("bbox", images, again)["Car"] == pytest.approx((1 + 2 / 3) / 2)


def test_masks_and_boxes_are_different_things(tmp_path):
    judge = evaluator(tmp_path, [image(thing(CAR, A))], tasks=("segm", "bbox"))
    found = instances((CAR, 0.5, A))
    found.pred_masks[:, :, 9:] = False  # 180 of 400 pixels
    judge.process([{"image_id": 0}], [{"instances": found}])
    results = judge.evaluate()
    assert results["open_images_segm"]["AP50-Car"] == 0
    assert results["open_images_bbox"]["AP50-Car"] == 100


@BOTH
def test_nothing_found_and_nothing_to_be_found(ap, task):
    assert ap(task, [image(thing(CAR, A))], [[]])[""] == 0
    assert all(map(math.isnan, ap(task, [image(absent=[CAR])], [[(CAR, 0.5, A)]]).values()))
    # A detection without a pixel is none.
    assert ap(task, [image(thing(CAR, A))], [[(CAR, 0.9, (5, 5, 5, 5)), (CAR, 0.5, A)]])[""] == 1


def test_predictions_of_all_processes(tmp_path, monkeypatch):
    images = [image(thing(CAR, A)), image(thing(CAR, B))]
    mine, other = (evaluator(tmp_path, images) for _ in range(2))
    other.process([{"image_id": 1}], [{"instances": instances((CAR, 0.5, B))}])
    mine.process([{"image_id": 0}], [{"instances": instances((CAR, 0.9, A))}])
    comm = "d2ssl.engine.open_images_ap.comm"
    monkeypatch.setattr(f"{comm}.gather", lambda data, dst: [data, other._predictions])
    assert mine.evaluate()["open_images_segm"]["AP50-Car"] == 100
    monkeypatch.setattr(f"{comm}.is_main_process", lambda: False)
    assert mine.evaluate() == {}
    monkeypatch.undo()
    assert mine.evaluate()["open_images_segm"]["AP50-Car"] == 50
    mine.reset()
    assert mine.evaluate()["open_images_segm"]["AP50-Car"] == 0


def test_against_a_slow_count(tmp_path):
    """Random scenes, and the same rules once more in plain loops over single detections."""
    rng = np.random.RandomState(0)

    def random_box():
        x, y = rng.randint(0, 80, 2)
        return (x, y, x + rng.randint(5, 21), y + rng.randint(5, 21))

    images, found = [], []
    for _ in range(12):
        objects = [
            thing(CAR, random_box(), masked=kind == 0, group=kind == 2)
            for kind in rng.randint(0, 3, 6)
        ]
        near = [
            np.clip(np.array(o["bbox"]) + rng.randint(-3, 4, 4), 0, SIDE).tolist() for o in objects
        ]
        boxes = [*near, *(random_box() for _ in range(6)), *near[:2]]
        images.append(image(*objects))
        found.append([(CAR, float(rng.rand()), tuple(box)) for box in boxes])
    judge = evaluator(tmp_path, images, tasks=("segm", "bbox"))
    for i, detections in enumerate(found):
        judge.process([{"image_id": i}], [{"instances": instances(*detections)}])
    results = judge.evaluate()
    for task in ("segm", "bbox"):
        slow = 100 * slow_ap(task, images, found)
        assert 5 < slow < 95  # else it would prove little
        assert results[f"open_images_{task}"]["AP50-Car"] == pytest.approx(slow)


def slow_ap(task, images, found):
    judged, total = [], 0
    for scene, detections in zip(images, found):
        things = scene["annotations"]
        target = [t for t in things if not t["iscrowd"]]
        ignored = [t for t in things if t["iscrowd"] and not t["is_group_of"]]
        groups = [t for t in things if t["is_group_of"]]
        if task == "bbox":
            target, ignored = [t for t in things if not t["is_group_of"]], []
        total += len(target) + (len(groups) if task == "bbox" else 0)
        left = sorted(detections, key=lambda d: -d[1])
        for pool, verdict in ((target, True), (ignored, None)):
            seen, rest = set(), []
            for detection in left:
                ious = [iou(detection[2], t["bbox"]) for t in pool]
                best = max(range(len(pool)), key=ious.__getitem__, default=None)
                if best is not None and ious[best] >= 0.5 and best not in seen:
                    seen.add(best)
                    judged.append((detection[1], verdict))
                else:
                    rest.append(detection)
            left = rest
        best_of = {}
        for _, score, box in left:
            shares = [common(box, g["bbox"]) / area(box) for g in groups]
            inside = max(range(len(groups)), key=shares.__getitem__, default=None)
            if inside is None or shares[inside] < 0.5:
                judged.append((score, False))
            else:
                best_of[inside] = max(score, best_of.get(inside, 0))
        if task == "bbox":
            judged += [(score, True) for score in best_of.values()]
    hits = [hit for _, hit in sorted(judged, reverse=True) if hit is not None]
    precision = [sum(hits[: n + 1]) / (n + 1) for n in range(len(hits))]
    return sum(max(precision[n:]) for n, hit in enumerate(hits) if hit) / total


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def common(a, b):
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    return max(0, sides[0]) * max(0, sides[1])


def iou(a, b):
    return common(a, b) / (area(a) + area(b) - common(a, b))


def test_predictions_are_written(tmp_path):
    judge = evaluator(tmp_path, [image(thing(CAR, A))], output_dir=str(tmp_path / "out"))
    judge.process([{"image_id": 0}], [{"instances": instances((CAR, 0.5, A))}])
    judge.evaluate()
    (row,) = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert row["image_id"] == 0 and row["category_id"] == CAR and row["bbox"] == [0, 0, 20, 20]
    assert row["segmentation"]["size"] == [SIDE, SIDE]


def test_photos_without_labels(tmp_path):
    register_dataset("photos", lambda: [{"image_id": 0}], mids=["/m/1"], thing_classes=["One"])
    with pytest.raises(D2SSLError, match="'photos': has no image-level labels"):
        OpenImagesEvaluator("photos").evaluate()
    assert OpenImagesEvaluator("photos", output_dir=str(tmp_path)).evaluate() == {}
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []


def test_what_cannot_be_evaluated(tmp_path):
    with pytest.raises(D2SSLError, match="no task 'keypoints'"):
        OpenImagesEvaluator("photos", tasks=("keypoints",))
    judge = evaluator(tmp_path, [image(thing(CAR, A))])
    found = instances((CAR, 0.5, A))
    found.remove("pred_masks")
    judge.process([{"image_id": 0}], [{"instances": found}])
    assert judge.evaluate() == {"open_images_bbox": pytest.approx(
        {"AP50": 100, "AP50-Car": 100, **{f"AP50-{n}": math.nan for n in NAMES if n != "Car"}},
        nan_ok=True,
    )}  # fmt: skip
    judge = evaluator(tmp_path, [image(thing(CAR, A))], tasks=("segm",))
    judge.process([{"image_id": 0}], [{"instances": found}])
    with pytest.raises(D2SSLError, match="have no masks"):
        judge.evaluate()
