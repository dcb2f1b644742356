"""
PASCAL VOC 2012 with its pictures of instances and classes, and sets in the same layout.

Refused: a list that names a photo, or a photo with a mask, that is not there; a mask of another
size than its photo; a class that does not exist, and an instance that has no class or several.
"""

import os
from collections.abc import Sequence
from functools import partial

import numpy as np

from d2ssl.data.datasets.catalog import class_names, register_dataset
from d2ssl.data.datasets.files import locate, read_lines, require_folder
from d2ssl.data.masks import grey_label_file, label_image_annotations, read_label_image
from d2ssl.data.photos import photo_size
from d2ssl.errors import D2SSLError

VOC_CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor".split()
)
VOID = 255  # in both kinds of mask: outlines, and what was left undecided
_LEAST_AGREEMENT = 0.9  # of an instance's pixels on its class

_OBJECTS, _KINDS = "SegmentationObject", "SegmentationClass"


def register_voc(name: str, root: str, classes: Sequence[str] = VOC_CLASSES) -> None:
    """
    Register a set in the layout of VOC 2012, for each of train, val and trainval.

    ``<name>_<split>`` has instances: each value of the photo's SegmentationObject but 0 and 255,
    with the class that SegmentationClass has at its pixels. ``<name>_sem_seg_<split>`` has the
    classes of SegmentationClass for semantic segmentation: 0 is background, 255 is ignored.
    A split whose list is absent can be registered, but not used.

    Args:
        name: how the sets' names begin.
        root: the folder VOC2012, with JPEGImages, SegmentationClass, SegmentationObject (not
            needed for sem_seg) and ``ImageSets/Segmentation/<split>.txt``.
        classes: names of the classes 1, 2, ... of SegmentationClass; their category_id counts
            from 0.
    """
    classes = class_names(classes)
    stuff = ["background", *classes]
    for split in ("train", "val", "trainval"):
        register_dataset(
            f"{name}_{split}",
            partial(_list, root, split, (_OBJECTS, _KINDS)),
            partial(_add_instances, root, classes),
            thing_classes=classes,
            evaluator_type="coco",
        )
        register_dataset(
            f"{name}_sem_seg_{split}",
            partial(_list, root, split, (_KINDS,)),
            partial(_add_labels, root, classes),
            stuff_classes=stuff,
            ignore_label=VOID,
            evaluator_type="sem_seg",
        )


def _list(root: str, split: str, masks: Sequence[str]) -> list[dict]:
    require_folder(root, "unpack VOCtrainval_11-May-2012.tar and give VOCdevkit/VOC2012")
    source = os.path.join(root, "ImageSets", "Segmentation", f"{split}.txt")
    stems = read_lines(source)
    if not stems:
        raise D2SSLError(f"{source}: names no photo; restore it")
    photos = locate(os.path.join(root, "JPEGImages"), [f"{s}.jpg" for s in stems], source)
    for folder in masks:
        locate(os.path.join(root, folder), [f"{s}.png" for s in stems], source, "mask")
    return [{"file_name": photo, "image_id": i} for i, photo in enumerate(photos)]


def _mask_file(root: str, folder: str, record: dict) -> str:
    below = os.path.relpath(record["file_name"], os.path.join(root, "JPEGImages"))
    return os.path.join(root, folder, os.path.splitext(below)[0] + ".png")


def _add_instances(root: str, classes: Sequence[str], record: dict) -> dict:
    height, width = photo_size(record["file_name"])
    objects_file, kinds_file = (_mask_file(root, f, record) for f in (_OBJECTS, _KINDS))
    ids = read_label_image(objects_file, (height, width))
    kinds = read_label_image(kinds_file, (height, width))

    def classify(value: int) -> tuple[int, int] | None:
        if value in (0, VOID):
            return None
        votes = np.bincount(kinds[ids == value], minlength=VOID + 1)
        votes[VOID] = 0
        kind = int(votes.argmax())
        if votes[kind] < _LEAST_AGREEMENT * votes.sum():
            raise D2SSLError(
                f"{kinds_file}: has classes {np.flatnonzero(votes).tolist()} where {objects_file} "
                f"has the one instance {value}; correct one of the two"
            )
        if not 1 <= kind <= len(classes):
            raise D2SSLError(
                f"{kinds_file}: has class {kind} where {objects_file} has the instance {value}, "
                f"and classes are 1..{len(classes)}; correct one of the two"
            )
        return kind - 1, 0

    annotations = label_image_annotations(ids, classify)
    return {**record, "height": height, "width": width, "annotations": annotations}


def _add_labels(root: str, classes: Sequence[str], record: dict) -> dict:
    height, width = photo_size(record["file_name"])
    labels = {kind: kind for kind in (*range(len(classes) + 1), VOID)}
    file = grey_label_file(_mask_file(root, _KINDS, record), labels, (height, width))
    return {**record, "height": height, "width": width, "sem_seg_file_name": file}
