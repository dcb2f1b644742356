"""
Instances in COCO's JSON format, read by Detectron2.

Detectron2 trusts such a file: what is wrong in it fails late, or not at all. So it is checked
first, and refused with the entry and the fix: entries that lack a key, ids that are there twice
or do not exist, photos that are missing or of another size, outlines and masks that cannot be
drawn. Coordinates stay as they are. In COCO they are continuous: pixel (x, y) covers [x, x + 1) x
[y, y + 1), and nothing is moved by half a pixel. Photos without annotations are kept.

The metadata name no ``json_file``, so that evaluators make their ground truth of the dicts. That is
what was trained on also where classes are left out and for part of a set. The AP is that of the
file, and is right also where pycocotools fails on that: annotations without ``area`` or
``iscrowd``, and one whose id is 0, which it never matches. Predictions are kept with the file's
ids of images and categories.
"""

import difflib
import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.data.datasets import load_coco_json

from d2ssl.data.datasets.catalog import class_names, register_dataset, set_metadata
from d2ssl.data.datasets.files import locate, read_json, require_folder
from d2ssl.data.datasets.outlines import check_size
from d2ssl.data.masks import FARTHEST, annotation_mask
from d2ssl.errors import D2SSLError


def register_coco(
    name: str,
    root: str,
    json_file: str = "annotations.json",
    images: str = "",
    classes: Sequence[str] | None = None,
) -> None:
    """
    Register photos with COCO's instances as ``name``; nothing is read before the set is used.

    Args:
        root: folder of the set.
        json_file: the annotations, below ``root``.
        images: folder that their file names start from, below ``root``; default: that of the
            annotations.
        classes: the categories to keep, in this order; default: all, in the order of their ids.
    """
    file = os.path.join(root, json_file)
    image_root = os.path.join(root, images) if images else os.path.dirname(file)
    load = partial(_load, name, root, file, image_root, classes)
    known = {} if classes is None else {"thing_classes": class_names(classes)}
    register_dataset(name, load, evaluator_type="coco", **known)


def _load(
    name: str, root: str, file: str, image_root: str, classes: Sequence[str] | None
) -> list[dict]:
    require_folder(root, "check the path")
    names, photos = _check(file, image_root)
    kept = _kept(names, classes, file)
    dicts = load_coco_json(file, image_root)
    for record in dicts:
        record["file_name"] = photos[record["image_id"]]
        try:
            _check_photo(record)
        except D2SSLError as error:
            raise D2SSLError(f"{file}: {error}") from None
        record["annotations"] = [
            {**annotation, "category_id": kept[annotation["category_id"]]}
            for annotation in record["annotations"]
            if annotation["category_id"] in kept
        ]
    # The metadata know the categories only now; parts of the set copy them later.
    classes = [names[i] for i in kept]
    set_metadata(name, thing_classes=classes, thing_dataset_id_to_contiguous_id=kept)
    return dicts


def _check_photo(record: dict) -> None:
    """
    Raises:
        D2SSLError: the photo is not of the size that the file states, or a run-length mask of it
            is damaged.
    """
    photo, height, width = record["file_name"], record["height"], record["width"]
    check_size(photo, height, width)
    for annotation in record["annotations"]:
        if isinstance(annotation.get("segmentation"), dict):
            try:
                annotation_mask(annotation, height, width)
            except D2SSLError as error:
                raise D2SSLError(f"{photo} has {error}") from None


def _kept(names: dict[int, str], classes: Sequence[str] | None, file: str) -> dict[int, int]:
    """Ids of the categories that are kept -> 0, 1 and so on."""
    if classes is None:
        return {category_id: place for place, category_id in enumerate(sorted(names))}
    ids = {name: category_id for category_id, name in names.items()}
    for wanted in classes:
        if wanted not in ids:
            nearest = difflib.get_close_matches(wanted, ids, n=1, cutoff=0)[0]
            raise D2SSLError(f"{file}: no category {wanted!r} in it; did you mean {nearest!r}?")
    return {ids[wanted]: place for place, wanted in enumerate(classes)}


def _check(file: str, image_root: str) -> tuple[dict[int, str], dict[int, str]]:
    """
    The categories' names and the photos' paths, each by their ids.

    Raises:
        D2SSLError: see the head of this module.
    """
    content = read_json(file)
    images = _by_id(content, "images", ("file_name", "height", "width"), file)
    categories = _by_id(content, "categories", ("name",), file)
    annotations = _by_id(content, "annotations", ("image_id", "category_id", "bbox"), file)
    names = {category_id: category["name"] for category_id, category in categories.items()}
    if not images or not categories:
        raise D2SSLError(f"{file}: has no {'categories' if images else 'images'}; export it again")
    if len({name for name in names.values() if isinstance(name, str)}) < len(names):
        raise D2SSLError(f"{file}: a category has no name or that of another; rename or merge them")
    for image_id, image in images.items():
        size = image["height"], image["width"]
        if not all(type(side) is int and side > 0 for side in size):
            raise D2SSLError(f"{file}: image {image_id} has no proper height and width {size}")
    photos = locate(image_root, [str(image["file_name"]) for image in images.values()], file)
    with_masks = any(a.get("segmentation") is not None for a in annotations.values())
    for annotation_id, annotation in annotations.items():
        try:
            _check_annotation(annotation, images, categories, with_masks)
        except D2SSLError as error:
            raise D2SSLError(f"{file}: annotation {annotation_id} {error}") from None
    return names, dict(zip(images, photos))


def _by_id(content: Any, kind: str, keys: Sequence[str], file: str) -> dict[int, dict]:
    """One of the file's lists, by the entries' ids, with the keys that each must have."""
    entries = content.get(kind) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise D2SSLError(f"{file}: has no list of {kind}; is it in COCO's instances format?")
    by_id = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise D2SSLError(f"{file}: number {number} of {kind} is no entry; export it again")
        absent = [key for key in ("id", *keys) if key not in entry]
        if absent:
            raise D2SSLError(
                f"{file}: number {number} of {kind} has no {', '.join(absent)}; export it again"
            )
        if type(entry["id"]) is not int:
            raise D2SSLError(
                f"{file}: id {entry['id']!r} in {kind} is no whole number; number the entries"
            )
        if entry["id"] in by_id:
            raise D2SSLError(f"{file}: id {entry['id']} is there twice in {kind}; number them anew")
        by_id[entry["id"]] = entry
    return by_id


def _check_annotation(annotation: dict, images: dict, categories: dict, with_masks: bool) -> None:
    """
    Raises:
        D2SSLError: what is wrong, to be read after "annotation 3".
    """
    for key, known in (("image_id", images), ("category_id", categories)):
        value = annotation[key]
        if type(value) is not int or value not in known:
            raise D2SSLError(
                f"has the {key} {value!r}, which is not in the file; add or correct it"
            )
    bbox = annotation["bbox"]
    if not _are_numbers(bbox) or len(bbox) != 4 or min(bbox[2:]) < 0:
        raise D2SSLError(f"has the bbox {bbox!r}; give x, y, width, height")
    if annotation.get("iscrowd", 0) not in (0, 1):
        raise D2SSLError(f"has iscrowd {annotation['iscrowd']!r}; give 0 or 1")
    if annotation.get("ignore"):
        raise D2SSLError("is marked 'ignore', unknown to Detectron2; remove it or set iscrowd")
    if with_masks:
        image = images[annotation["image_id"]]
        _check_segmentation(annotation.get("segmentation"), image["height"], image["width"])


def _check_segmentation(segmentation: Any, height: int, width: int) -> None:
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if segmentation.get("size") != [height, width]:
            raise D2SSLError(
                f"has a run-length mask of size {segmentation.get('size')} on a photo of "
                f"{[height, width]} (height, width); scale it"
            )
        listed = isinstance(counts, list)
        if not counts or not (_are_numbers(counts) if listed else isinstance(counts, str)):
            raise D2SSLError("has a run-length mask without counts; export it again")
        if listed and sum(counts) != height * width:
            raise D2SSLError(
                f"has a run-length mask of {sum(counts)} pixels on a photo of {height * width}; "
                "export it again"
            )
    elif isinstance(segmentation, list) and segmentation:
        for polygon in segmentation:
            if not _are_numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
                raise D2SSLError(
                    "has a polygon that is no list of x, y, x, y, ... of 3 points or more; draw "
                    "it again"
                )
            if max(map(abs, polygon)) >= FARTHEST:
                raise D2SSLError(f"has a point {FARTHEST} pixels away or more; draw it again")
    else:
        raise D2SSLError("has no outline or mask in its segmentation; draw it or take it out")


def _are_numbers(values: Any) -> bool:
    try:
        return isinstance(values, list) and all(map(math.isfinite, values))
    except TypeError:
        return False
