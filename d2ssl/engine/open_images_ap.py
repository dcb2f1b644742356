"""
The AP of the Open Images Challenge 2019, of masks and of boxes.

Written from the description (https://storage.googleapis.com/openimages/web/evaluation.html) and
from what TensorFlow's ``OpenImagesChallengeEvaluator`` does, the challenge's own code
(https://github.com/tensorflow/models, research/object_detection/utils):

- *Hierarchy.* Objects and labels of present classes also count for all classes above theirs,
  labels of absent classes for all classes below. Detections count for the class that they name
  alone: a detector is expected to report the classes above as well.
- *Verified classes.* In each image, detections of a class are ignored unless the class is labelled
  there as present or absent, or has an object.
- *Matching* of the detections of one class in one image, best score first: a detection is a true
  positive if the object that it overlaps most has an IoU of 0.5 or more with it and was not found
  by a better one. All others are false positives, except as follows.
- *Masks.* Objects with masks are matched first, by mask. Of the detections that remain, those that
  find an object without a mask, by the boxes around both and by the same rule, are ignored; and so
  are all of which half the box or more lies inside a box around a group. Neither of them is an
  object to be found.
- *Boxes.* All single objects are matched by their boxes. Of the detections that remain, those of
  which half or more lies inside a box around a group belong to the group: the best is a true
  positive and the others are ignored. A group is one object to be found (weight 1).
- *AP* is the area under precision over recall, precision made to fall monotonously and no points
  of recall picked out; the mean is over classes with objects to be found.
"""

import itertools
import json
import logging
import os
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pycocotools.mask as coco_mask
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BoxMode
from detectron2.utils import comm

from d2ssl.atomic import atomic_open
from d2ssl.data.datasets.catalog import decoded, listed
from d2ssl.data.datasets.open_images import read_hierarchy
from d2ssl.data.masks import run_length
from d2ssl.errors import D2SSLError

logger = logging.getLogger(__name__)

LEAST_OVERLAP = 0.5


class OpenImagesEvaluator(DatasetEvaluator):
    """The challenge's AP, as described at the head of this module."""

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str = "",
        *,
        expand_predictions: bool = False,
    ):
        """
        Args:
            dataset_name: a set of :func:`~d2ssl.data.datasets.open_images.register_open_images`, or
                a part of one.
            tasks: "segm" and "bbox", one or both; default: both, or "bbox" where the predictions
                have no masks.
            distributed: collect the predictions of all processes; only the first one evaluates.
            output_dir: folder for ``coco_instances_results.json``, which COCO's evaluator writes as
                well and ``tools/write_submission.py`` reads; "": not written.
            expand_predictions: count each detection for all classes above its own too.
        """
        unknown = [task for task in tasks or () if task not in ("segm", "bbox")]
        if unknown:
            raise D2SSLError(f"OpenImagesEvaluator: no task {unknown[0]!r}; give 'segm' or 'bbox'")
        self._name = dataset_name
        self._tasks = tasks
        self._distributed = distributed
        self._output_dir = output_dir
        self._expand = expand_predictions
        self.reset()

    def reset(self) -> None:
        self._predictions: list[dict] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """As Detectron2's: dicts with "image_id", and outputs with "instances" for each."""
        for image, output in zip(inputs, outputs):
            instances = output["instances"].to("cpu")
            self._predictions += instances_to_coco_json(instances, image["image_id"])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """
        Returns:
            {"open_images_segm": {"AP50": 21.0, "AP50-Person": 40.0, ...}, ...} in percent; NaN for
            classes without an object. {} in all processes but the first, and for the challenge's
            test photos, whose predictions are only written.

        Raises:
            D2SSLError: a set without image-level labels, or "segm" of predictions without masks.
        """
        predictions = self._predictions
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(predictions, dst=0)
            if not comm.is_main_process():
                return {}
            predictions = list(itertools.chain(*gathered))
        if self._output_dir:
            os.makedirs(self._output_dir, exist_ok=True)
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            with atomic_open(path) as file:
                json.dump(predictions, file)
        dicts = listed(self._name)
        metadata = MetadataCatalog.get(self._name)  # complete now that the set was listed
        if not all("positive_labels" in entry for entry in dicts):
            if hasattr(metadata, "mids") and self._output_dir:  # photos to make a submission for
                logger.info(f"{self._name}: has no image-level labels, so there is no AP")
                return {}
            raise D2SSLError(
                f"data set {self._name!r}: has no image-level labels; evaluate a train or "
                "validation set of register_open_images, or give output_dir for the predictions"
            )
        masks = all("segmentation" in p for p in predictions)
        tasks = self._tasks or (("segm", "bbox") if masks else ("bbox",))
        if "segm" in tasks and not masks:
            raise D2SSLError("these predictions have no masks; evaluate with tasks=('bbox',)")
        above = read_hierarchy(metadata.hierarchy_file, metadata.mids)
        counts = self._count(dicts, predictions, above, tasks)
        results = {}
        for task, classes in counts.items():
            values = [100 * count.average_precision() for count in classes]
            known = [value for value in values if value == value]
            mean = float(np.mean(known)) if known else float("nan")
            by_class = {f"AP50-{c}": value for c, value in zip(metadata.thing_classes, values)}
            results[f"open_images_{task}"] = {"AP50": mean, **by_class}
            logger.info(f"{self._name}: {task} AP50 of the challenge {mean:.3f}")
        return results

    def _count(
        self,
        dicts: list[dict],
        predictions: list[dict],
        above: list[set[int]],
        tasks: Sequence[str],
    ) -> dict[str, list["_Count"]]:
        by_image = defaultdict(list)
        for prediction in predictions:
            by_image[prediction["image_id"]].append(prediction)
        counts = {task: [_Count() for _ in above] for task in tasks}
        for image in decoded(self._name, dicts):
            detections = by_image.get(image["image_id"], [])
            _add_image(image, detections, above, counts, self._expand)
        return counts


class _Count:
    """What was found of one class, over all images."""

    def __init__(self):
        self.num_objects = 0
        self.scores: list[np.ndarray] = []
        self.hits: list[np.ndarray] = []  # true positives, bool

    def add(self, scores: np.ndarray, hits: np.ndarray, num_objects: int) -> None:
        self.scores.append(scores)
        self.hits.append(hits)
        self.num_objects += num_objects

    def average_precision(self) -> float:
        """0..1; NaN where there is nothing to be found."""
        if self.num_objects == 0:
            return float("nan")
        order = np.argsort(-np.concatenate(self.scores), kind="stable")
        hits = np.concatenate(self.hits)[order]
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        highest = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a larger one
        return float(highest[hits].sum() / self.num_objects)


def _add_image(
    image: dict,
    detections: list[dict],
    above: list[set[int]],
    counts: dict[str, list[_Count]],
    expand: bool,
) -> None:
    """Count one image for all classes that are verified in it."""
    height, width = image["height"], image["width"]
    objects = defaultdict(list)  # of each class, with those of the classes below
    for annotation in image["annotations"]:
        x1, y1, x2, y2 = BoxMode.convert(
            annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS
        )
        thing = {
            "box": [x1, y1, x2 - x1, y2 - y1],
            "mask": None
            if annotation["iscrowd"]
            else run_length(annotation["segmentation"], height, width),
            "group": annotation.get("is_group_of", False),
        }
        for place in (annotation["category_id"], *above[annotation["category_id"]]):
            objects[place].append(thing)
    absent = set(image["negative_labels"])
    verified = set(objects).union(image["positive_labels"])
    verified.update(*(above[place] for place in image["positive_labels"]))
    verified.update(place for place, over in enumerate(above) if place in absent or over & absent)

    found = defaultdict(list)
    for detection in sorted(detections, key=lambda d: -d["score"]):
        place = detection["category_id"]
        for shown in (place, *above[place]) if expand else (place,):
            if shown in verified:
                found[shown].append(detection)
    match = {"segm": _match_masks, "bbox": _match_boxes}
    for task, classes in counts.items():
        for place in set(objects) | set(found):
            classes[place].add(*match[task](found[place], objects[place]))


def _match_masks(detections: list[dict], objects: list[dict]) -> tuple[np.ndarray, np.ndarray, int]:
    """
    Scores and hits of the detections that count, and how many objects there are to be found.

    Args:
        detections: of one class in one image, best score first.
        objects: with "box" (XYWH), "mask" (RLE or None) and "group" (bool).
    """
    masks = [detection["segmentation"] for detection in detections]
    boxes = [coco_mask.toBbox(mask).tolist() for mask in masks]
    some = [i for i, (_, _, w, h) in enumerate(boxes) if w > 0 and h > 0]  # others show nothing
    masks, boxes = [masks[i] for i in some], [boxes[i] for i in some]
    scores = np.array([detections[i]["score"] for i in some])
    masked = [thing["mask"] for thing in objects if thing["mask"] is not None]
    single = [x["box"] for x in objects if x["mask"] is None and not x["group"]]
    groups = [x["box"] for x in objects if x["mask"] is None and x["group"]]
    hits = _first_to_find(_overlaps(masks, masked))
    unmasked = _first_to_find(_overlaps(boxes, single), ~hits)
    grouped = (_overlaps(boxes, groups, of_detection=True) >= LEAST_OVERLAP).any(axis=1)
    counted = hits | ~(unmasked | grouped)
    return scores[counted], hits[counted], len(masked)


def _match_boxes(detections: list[dict], objects: list[dict]) -> tuple[np.ndarray, np.ndarray, int]:
    """See :func:`_match_masks`."""
    detections = [d for d in detections if d["bbox"][2] > 0 and d["bbox"][3] > 0]
    boxes = [detection["bbox"] for detection in detections]
    scores = np.array([detection["score"] for detection in detections])
    single = [thing["box"] for thing in objects if not thing["group"]]
    groups = [thing["box"] for thing in objects if thing["group"]]
    hits = _first_to_find(_overlaps(boxes, single))
    shares = _overlaps(boxes, groups, of_detection=True)
    first = _first_to_find(shares, ~hits)
    counted = hits | first | ~(shares >= LEAST_OVERLAP).any(axis=1)
    return scores[counted], (hits | first)[counted], len(objects)


def _overlaps(detections: list, objects: list, of_detection: bool = False) -> np.ndarray:
    """DxN: IoU of boxes (XYWH) or masks (RLE), or the share of the detection that is covered."""
    if not detections or not objects:
        return np.zeros((len(detections), len(objects)))
    return coco_mask.iou(detections, objects, [of_detection] * len(objects))


def _first_to_find(overlaps: np.ndarray, taking_part: np.ndarray | None = None) -> np.ndarray:
    """
    Which detections are the first to overlap enough with the object that they overlap most.

    Args:
        overlaps: DxN, rows by falling score.
        taking_part: D, bool; default: all.
    """
    found = np.zeros(len(overlaps), dtype=bool)
    if overlaps.size:
        enough = overlaps.max(axis=1) >= LEAST_OVERLAP
        rows = np.flatnonzero(enough if taking_part is None else enough & taking_part)
        _, first = np.unique(overlaps[rows].argmax(axis=1), return_index=True)
        found[rows[first]] = True
    return found
