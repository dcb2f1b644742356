"""
Open Images Challenge 2019, instance segmentation: 300 classes, in the layout as downloaded.

Two things differ from COCO. An image is annotated only for the classes that its image-level labels
name, as present (every instance then has a box) or absent. And not every boxed object has a mask:
a box around a group of objects never has one, and single objects often lack theirs. What has no
mask becomes an annotation with ``iscrowd`` 1, whose mask is its box as RLE and whose
``is_group_of`` says which of the two it is. Detectron2 leaves crowds out of training, and COCO's AP
ignores detections inside them; :class:`~d2ssl.engine.open_images_ap.OpenImagesEvaluator` follows
the challenge instead.

Formats: https://storage.googleapis.com/openimages/web/challenge2019.html
"""

import csv
import os
from collections.abc import Iterator
from functools import partial

import cv2
import numpy as np
import pycocotools.mask as coco_mask
from detectron2.structures import BoxMode

from d2ssl.data.datasets.catalog import register_dataset, set_metadata
from d2ssl.data.datasets.files import Notes, locate, read_csv, read_json, read_lines, require_folder
from d2ssl.data.datasets.folder import list_photos
from d2ssl.data.masks import mask_annotation, read_label_image
from d2ssl.data.photos import add_size, photo_size
from d2ssl.errors import D2SSLError

CLASSES = "challenge-2019-classes-description-segmentable.csv"
HIERARCHY = "challenge-2019-label300-segmentable-hierarchy.json"

# The box file has more digits than the mask file: the same box is found by its IoU.
_SAME_BOX = 0.8
_MAX_STRETCH = 0.05  # by which the sides of a mask may differ in proportion from the photo's

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 as parts of the photo's sides


def register_open_images(name: str, root: str) -> None:
    """
    Register ``<name>_train``, ``<name>_validation`` and ``<name>_test`` (photos alone).

    Nothing is read before a set is used; only then do ``thing_classes`` and ``mids`` (the label of
    each class, such as ``/m/01g317``) join the set's metadata.

    Args:
        name: how the sets' names begin.
        root: folder with the challenge's CSV and JSON files, ``images`` and ``masks``.
    """
    for split in ("train", "validation"):
        register_dataset(
            f"{name}_{split}",
            partial(_load_split, f"{name}_{split}", root, split),
            partial(_decode, root, split),
            evaluator_type="coco",
            hierarchy_file=os.path.join(root, HIERARCHY),
        )
    register_dataset(f"{name}_test", partial(_load_test, f"{name}_test", root), add_size)


def read_hierarchy(path: str, mids: list[str]) -> list[set[int]]:
    """
    The classes above each class, near and far.

    Args:
        path: the challenge's hierarchy; nodes that are no class, such as its root, only pass on
            what is above them.
        mids: the label of each class.

    Returns:
        For each class, the places of its ancestors in ``mids``.

    Raises:
        D2SSLError: not a hierarchy, or one without some of the classes.
    """
    places = {mid: place for place, mid in enumerate(mids)}
    above: dict[int, set[int]] = {}

    def walk(node: dict, over: frozenset[int]) -> None:
        place = places.get(node["LabelName"])
        if place is not None:  # a class may stand in several places
            above.setdefault(place, set()).update(over - {place})
            over |= {place}
        for child in node.get("Subcategory", ()):
            walk(child, over)

    try:
        walk(read_json(path), frozenset())
    except (KeyError, TypeError, AttributeError) as error:
        raise D2SSLError(f"{path}: is not a hierarchy of Open Images; get it again") from error
    absent = [mid for place, mid in enumerate(mids) if place not in above]
    if absent:
        raise D2SSLError(
            f"{path}: has no {absent[0]} ({len(absent)} of {len(mids)} classes are missing); is it "
            "the hierarchy of these classes?"
        )
    return [above[place] for place in range(len(mids))]


def _load_split(name: str, root: str, split: str) -> list[dict]:
    """
    Dicts with the image-level labels and, for :func:`_decode`, the rows of masks and boxes.

    Raises:
        D2SSLError: see the head of :mod:`~d2ssl.data.datasets.files`; a label that is no class, or
            a box off its photo.
    """
    require_folder(root, "register_open_images needs the folder with the challenge's CSV files")
    places = _read_classes(name, root)
    prefix = os.path.join(root, f"challenge-2019-{split}-segmentation-")
    labels = prefix + "imagelabels.csv"
    if not os.path.exists(labels) and os.path.exists(prefix + "labels.csv"):
        labels = prefix + "labels.csv"  # its name as downloaded
    images = _read_image_labels(labels, places)
    notes = Notes(root)
    _add_masks(prefix + "masks.csv", places, images, notes)
    _add_boxes(prefix + "bbox.csv", places, images, notes)
    notes.log()
    folder = os.path.join(root, "images", split)
    require_folder(folder, f"put the photos of the {split} set there")
    files = locate(folder, (f"{key}.jpg" for key in images), labels)
    return [
        {"file_name": file, "image_id": image_id, **image,
         "classes": sorted({place for _, place, _ in image["masks"]})}
        for image_id, (file, image) in enumerate(zip(files, images.values()))
    ]  # fmt: skip


def _load_test(name: str, root: str) -> list[dict]:
    require_folder(root, "register_open_images needs the folder with the challenge's CSV files")
    _read_classes(name, root)
    return list_photos(os.path.join(root, "images", "test"))


def _read_classes(name: str, root: str) -> dict[str, int]:
    """Label -> category_id; fills the metadata of the set ``name``."""
    path = os.path.join(root, CLASSES)
    rows = list(csv.reader(read_lines(path)))
    for row in rows:
        if len(row) != 2 or not row[0].startswith("/"):
            raise D2SSLError(f"{path}: {','.join(row)!r} is not a label and a name; get it again")
    places = {mid: place for place, (mid, _) in enumerate(rows)}
    if not rows or len(places) < len(rows):
        raise D2SSLError(f"{path}: has a class twice, or none at all; get it again")
    set_metadata(name, thing_classes=[title for _, title in rows], mids=list(places))
    return places


def _read_image_labels(path: str, places: dict[str, int]) -> dict[str, dict]:
    """ImageID -> what is known about the image, in the order of the file."""
    images: dict[str, dict] = {}
    for row in read_csv(path, ("ImageID", "LabelName", "Confidence")):
        place = _place(row, places, path)
        verdict = {"1": "positive_labels", "0": "negative_labels"}.get(row["Confidence"])
        if verdict is None:
            raise D2SSLError(
                f"{path}: image {row['ImageID']} has Confidence {row['Confidence']!r}; a verified "
                "label has 1 (present) or 0 (absent)"
            )
        image = images.get(row["ImageID"])
        if image is None:
            image = {"positive_labels": [], "negative_labels": [], "masks": [], "boxes": []}
            images[row["ImageID"]] = image
        image[verdict].append(place)
    if not images:
        raise D2SSLError(f"{path}: has no row; get it again")
    return images


def _add_masks(path: str, places: dict[str, int], images: dict[str, dict], notes: Notes) -> None:
    """(MaskPath, category_id, box) of each image."""
    sides = ("BoxXMin", "BoxYMin", "BoxXMax", "BoxYMax")
    for row, place, box in _read_boxes(path, ("MaskPath",), sides, places):
        if row["ImageID"] in images:
            images[row["ImageID"]]["masks"].append((row["MaskPath"], place, box))
        else:
            notes.add("masks of images without image-level labels are left out", row["ImageID"])


def _add_boxes(path: str, places: dict[str, int], images: dict[str, dict], notes: Notes) -> None:
    """(category_id, box, is_group_of) of each image, objects with a mask left out."""
    sides = ("XMin", "YMin", "XMax", "YMax")
    for row, place, box in _read_boxes(path, ("IsGroupOf",), sides, places):
        image = images.get(row["ImageID"])
        if row["IsGroupOf"] not in ("0", "1"):
            raise D2SSLError(
                f"{path}: image {row['ImageID']} has IsGroupOf {row['IsGroupOf']!r}; give 0 or 1"
            )
        group = row["IsGroupOf"] == "1"
        if image is None:
            notes.add("boxes of images without image-level labels are left out", row["ImageID"])
        elif group or not any(
            place == other and _box_iou(box, masked) > _SAME_BOX
            for _, other, masked in image["masks"]
        ):
            image["boxes"].append((place, box, group))


def _read_boxes(
    path: str, columns: tuple[str, ...], sides: tuple[str, ...], places: dict[str, int]
) -> Iterator[tuple[dict, int, Box]]:
    """Rows of a file with a box in each, with category_id and box."""
    for row in read_csv(path, ("ImageID", "LabelName", *columns, *sides)):
        try:
            box = tuple(float(row[side]) for side in sides)
        except ValueError:
            box = (float("nan"),) * 4  # fails the next test
        x1, y1, x2, y2 = box
        if not (0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1):
            raise D2SSLError(
                f"{path}: image {row['ImageID']} has a box of {', '.join(row[s] for s in sides)} "
                f"({', '.join(sides)}); give 0..1, least first"
            )
        yield row, _place(row, places, path), box


def _place(row: dict, places: dict[str, int], path: str) -> int:
    try:
        return places[row["LabelName"]]
    except KeyError:
        raise D2SSLError(
            f"{path}: image {row['ImageID']} has LabelName {row['LabelName']!r}, which is not in "
            f"{CLASSES}; get both from the same challenge"
        ) from None


def _box_iou(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b))
    return width * height / (areas - width * height)


def _decode(root: str, split: str, entry: dict) -> dict:
    """
    Read a photo's header and masks; the boxes are those that people drew, not those of the masks.

    Raises:
        D2SSLError: a mask that is missing, listed twice, damaged, outside its folder or not of the
            photo's shape.
    """
    entry = dict(entry)
    height, width = photo_size(entry["file_name"])
    rows, boxes, _ = (entry.pop(key) for key in ("masks", "boxes", "classes"))
    folder = os.path.join(root, "masks", split)
    digit = os.path.basename(entry["file_name"])[0]
    part = os.path.join(folder, f"{split}-masks-{digit}")
    source = os.path.join(root, f"challenge-2019-{split}-segmentation-masks.csv")
    names = [name for name, _, _ in rows]
    files = locate(part if os.path.isdir(part) else folder, names, source, "mask")
    annotations = []
    for file, (_, place, box) in zip(files, rows):
        annotation = mask_annotation(_read_mask(file, height, width), place)
        if annotation is None:  # nothing in it: an object without a mask
            boxes = [*boxes, (place, box, False)]
        else:
            annotations.append({**annotation, "bbox": _pixels(box, height, width)})
    annotations += [_unmasked(*row, height, width) for row in boxes]
    return {**entry, "height": height, "width": width, "annotations": annotations}


def _read_mask(path: str, height: int, width: int) -> np.ndarray:
    """
    A mask at the photo's size, HxW bool: pixels of which it covers more than half.

    Masks were drawn on a larger or smaller copy of the photo.
    """
    mask = read_label_image(path) > 0
    own_height, own_width = mask.shape
    if (own_height, own_width) == (height, width):
        return mask
    if abs(own_width * height - own_height * width) > _MAX_STRETCH * own_height * width:
        raise D2SSLError(
            f"{path}: is {own_width}x{own_height}, its photo {width}x{height}; was the photo "
            "rotated or cropped?"
        )
    return cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) > 0.5


def _unmasked(place: int, box: Box, is_group_of: bool, height: int, width: int) -> dict:
    x1, y1, x2, y2 = bbox = _pixels(box, height, width)
    xywh = np.array([[x1, y1, x2 - x1, y2 - y1]])
    return {
        "bbox": bbox,
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": place,
        "segmentation": coco_mask.frPyObjects(xywh, height, width)[0],
        "iscrowd": 1,
        "is_group_of": is_group_of,
    }


def _pixels(box: Box, height: int, width: int) -> list[float]:
    return [side * size for side, size in zip(box, (width, height, width, height))]
